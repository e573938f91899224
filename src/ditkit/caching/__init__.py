"""Policies that compute less by keeping what was computed, one file each."""

from ditkit.caching.taylorseer import TaylorSeer

__all__ = ["TaylorSeer"]
