"""Linear layers chosen for each sample: y_b = sum_j gate_bj (x_b W_e + a_e), e = index_bj."""

from ditkit.ops.routed_linear.operation import routed_linear

__all__ = ["routed_linear"]
