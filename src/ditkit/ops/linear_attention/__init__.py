"""Linear attention over lists of key blocks: a numerator and a denominator for each query, several kernels."""

from ditkit.ops.linear_attention.aggregate import Aggregation, aggregate
from ditkit.ops.linear_attention.operation import Kernel, Sums, block_linear_attention, divide
from ditkit.ops.linear_attention.reference import FeatureMap, feature_map, sums_reference

__all__ = [
    "Aggregation",
    "FeatureMap",
    "Kernel",
    "Sums",
    "aggregate",
    "block_linear_attention",
    "divide",
    "feature_map",
    "sums_reference",
]
