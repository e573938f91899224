"""Backbones, one file each."""

from ditkit.models.dit import DiT, DiTConfig

__all__ = ["DiT", "DiTConfig"]
