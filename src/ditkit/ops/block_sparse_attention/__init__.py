"""Attention over lists of key blocks: one plan, several kernels, output and log-sum-exp."""

from ditkit.ops.block_sparse_attention.build import (
    Allowed,
    block_map,
    build_plan,
    dense_plan,
    narrowed,
    near_blocks,
    with_valid,
)
from ditkit.ops.block_sparse_attention.chosen import chooser_handle
from ditkit.ops.block_sparse_attention.dispatch import (
    Choice,
    Kernel,
    attend,
    attend_chosen,
    attend_mapped,
    choose,
    pays,
)
from ditkit.ops.block_sparse_attention.operation import for_valid
from ditkit.ops.block_sparse_attention.plan import BlockPlan
from ditkit.ops.block_sparse_attention.reference import Attended, attend_reference, merge

__all__ = [
    "Allowed",
    "Attended",
    "BlockPlan",
    "Choice",
    "Kernel",
    "attend",
    "attend_chosen",
    "attend_mapped",
    "attend_reference",
    "block_map",
    "build_plan",
    "choose",
    "chooser_handle",
    "dense_plan",
    "for_valid",
    "merge",
    "narrowed",
    "near_blocks",
    "pays",
    "with_valid",
]
