"""Transforms and policies that fit a model to something new, one file each."""

from ditkit.adapt.lora import LoRA, Merged
from ditkit.adapt.task_routing import TaskRouting

__all__ = ["LoRA", "Merged", "TaskRouting"]
