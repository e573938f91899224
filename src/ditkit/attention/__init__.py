"""Policies whose attention leaves out keys, or is another one, one file each."""

from ditkit.attention.band import Band
from ditkit.attention.draft import Draft
from ditkit.attention.grouped import Grouped
from ditkit.attention.linear import ReluLinear
from ditkit.attention.neighbourhood import Neighbourhood
from ditkit.attention.reshaped import Reshaped, ReshapedGrouped, ReshapedNeighbourhood
from ditkit.attention.searched import HeadTable, Searched
from ditkit.attention.sparse_linear import SparseLinear

__all__ = [
    "Band",
    "Draft",
    "Grouped",
    "HeadTable",
    "Neighbourhood",
    "ReluLinear",
    "Reshaped",
    "ReshapedGrouped",
    "ReshapedNeighbourhood",
    "Searched",
    "SparseLinear",
]
