"""The selective scan of Mamba: a gated recurrence over tokens, several sequences a sample."""

from ditkit.ops.selective_scan.dispatch import Kernel, selective_scan
from ditkit.ops.selective_scan.reference import scan_reference

__all__ = ["Kernel", "scan_reference", "selective_scan"]
