"""A backbone, a cache and a recipe, each as one file dropped into its package."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path


def pytest_configure() -> None:
    """Let the folders here be further homes of the packages of their names: pytest's `-p toys` does this."""
    for name in ("models", "caching", "recipes"):
        import_module(f"ditkit.{name}").__path__.append(str(Path(__file__).parent / name))
