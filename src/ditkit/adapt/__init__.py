"""Transforms and policies that fit a model to something new, one file each."""

from ditkit.adapt.lora import LoRA, Merged

__all__ = ["LoRA", "Merged"]
