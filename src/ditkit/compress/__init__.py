"""Transforms that make a model smaller or cheaper, one file each."""

from ditkit.compress.calibration import Calibration, recording
from ditkit.compress.kept import Kept
from ditkit.compress.learned_depth import LearnedDepth, decide
from ditkit.compress.temporal import TemporalMaintenance

__all__ = ["Calibration", "Kept", "LearnedDepth", "TemporalMaintenance", "decide", "recording"]
