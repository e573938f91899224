"""A model with some of its blocks: what pruning by depth leaves, whichever way they were chosen."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ditkit.core.errors import ConfigError, unknown
from ditkit.core.transform import Transform


@dataclass(frozen=True)
class Kept(Transform):
    """Keep these blocks of a stack, in their order, numbered anew from 0.

    Args:
        blocks: numbers of the blocks kept, ascending; none keeps all.
        stack: its name (`Model.stacks`).
    """

    blocks: tuple[int, ...] = ()
    stack: str = "blocks"

    def __post_init__(self) -> None:
        if list(self.blocks) != sorted(set(self.blocks)) or any(n < 0 for n in self.blocks):
            raise ConfigError(f"Kept: blocks={self.blocks}, expected ascending numbers from 0, each once")

    def check(self, model: Any) -> None:
        stacks = model.stacks()
        if self.stack not in stacks:
            raise ConfigError("Kept: " + unknown("stack", self.stack, stacks))
        count = len(model.get_submodule(stacks[self.stack].path))
        if beyond := [n for n in self.blocks if n >= count]:
            raise ConfigError(
                f"Kept: blocks={self.blocks} name block {beyond[0]}, expected numbers of the {count} of "
                f"{self.stack!r}, 0 to {count - 1}"
            )
        if lost := [n % count for n in stacks[self.stack].shared if n % count not in self.blocks]:
            raise ConfigError(
                f"Kept: blocks={self.blocks} leave out block {lost[0]} of {self.stack!r}, which other parts of a "
                f"{type(model).__name__} read; expected it among them"
            )
        blocks: Any = model.get_submodule(stacks[self.stack].path)
        for n, block in enumerate(blocks):
            if self.blocks and n not in self.blocks and getattr(block, "text_role", "own") != "own":
                raise ConfigError(
                    f"Kept: blocks={self.blocks} leave out block {n}, which hands a text on or reads one, expected it "
                    "among them"
                )

    def shape(self, model: Any) -> Any:
        if self.blocks:
            path = model.stacks()[self.stack].path
            parent, _, leaf = path.rpartition(".")
            blocks = model.get_submodule(path)
            setattr(model.get_submodule(parent), leaf, nn.ModuleList(blocks[n] for n in self.blocks))
        return model

    def apply(self, model: Any, calibration: Any = None) -> tuple[Any, Mapping[str, Any]]:
        before = len(model.get_submodule(model.stacks()[self.stack].path))
        return self.shape(model), {"blocks": before, "kept": len(self.blocks)}

    def origin(self, name: str) -> str:
        found = re.match(re.escape(self.stack) + r"\.(\d+)(?=\.|$)(.*)", name)
        if not found or int(found[1]) >= len(self.blocks):
            return name
        return f"{self.stack}.{self.blocks[int(found[1])]}{found[2]}"

    def plain(self, model: Any) -> Mapping[str, Any] | None:
        stacked = model.stacks()[self.stack]
        config = getattr(getattr(model, "transformer", None), "config", {})
        renumbered = {
            name: tuple(self.blocks.index(n) for n in config[name] if n in self.blocks)
            for name in stacked.indexed
            if config.get(name)
        }
        return {stacked.field: len(self.blocks), **renumbered}

    @classmethod
    def small(cls, model: Any) -> tuple[Transform, ...]:
        stack, stacked = next(iter(model.stacks().items()))
        last = len(model.get_submodule(stacked.path)) - 1
        return (cls(blocks=(0, last), stack=stack),)

    def exact(self) -> Kept:
        return replace(self, blocks=())
