"""Transforms that make a model smaller or cheaper, one file each."""

from ditkit.compress.kept import Kept

__all__ = ["Kept"]
