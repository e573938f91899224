"""Transforms that make a model smaller or cheaper, one file each."""

from ditkit.compress.kept import Kept
from ditkit.compress.learned_depth import LearnedDepth, decide

__all__ = ["Kept", "LearnedDepth", "decide"]
