"""Data: named sets whose bytes are pinned, and folders of a user's own images."""

from ditkit.data.images import ImageSet
from ditkit.data.loading import load, names

__all__ = ["ImageSet", "load", "names"]
