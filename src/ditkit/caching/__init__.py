"""Policies that compute less by keeping what was computed, one file each."""

from ditkit.caching.branch_cache import BranchCache
from ditkit.caching.confident_taylor import ConfidentTaylor
from ditkit.caching.harmonica import HarmoniCa
from ditkit.caching.regional import RAS
from ditkit.caching.taylorseer import TaylorSeer

__all__ = ["RAS", "BranchCache", "ConfidentTaylor", "HarmoniCa", "TaylorSeer"]
