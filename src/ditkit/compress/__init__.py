"""Transforms and policies that make a model smaller or cheaper, one file each."""

from ditkit.compress.calibration import Calibration, recording
from ditkit.compress.contiguous import Contiguous, plug
from ditkit.compress.dydit import DyDiT
from ditkit.compress.kept import Kept
from ditkit.compress.learned_depth import LearnedDepth, decide
from ditkit.compress.temporal import TemporalMaintenance
from ditkit.compress.temporal_cache import TemporalFeatures

__all__ = [
    "Calibration",
    "Contiguous",
    "DyDiT",
    "Kept",
    "LearnedDepth",
    "TemporalFeatures",
    "TemporalMaintenance",
    "decide",
    "plug",
    "recording",
]
