"""Transforms and policies that make a model smaller or cheaper, one file each."""

from ditkit.compress.dydit import DyDiT
from ditkit.compress.kept import Kept
from ditkit.compress.learned_depth import LearnedDepth, decide

__all__ = ["DyDiT", "Kept", "LearnedDepth", "decide"]
