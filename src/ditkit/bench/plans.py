"""Attention plans on a layout: keys of a query, visited blocks, and the chosen kernel."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from ditkit.attention.dynamic import Dynamic
from ditkit.attention.pattern import Pattern, cached_plan
from ditkit.attention.searched import PATTERNS, STRIPE, HeadTable, Searched
from ditkit.core.errors import ConfigError, ShapeError
from ditkit.core.grid import Grid, image_of, sequence
from ditkit.core.model import Model
from ditkit.core.run import attended
from ditkit.core.spec import spec
from ditkit.ops.block_sparse_attention import BlockPlan, choose, pays
from ditkit.ops.block_sparse_attention.plan import FULL

if TYPE_CHECKING:
    from ditkit.core.terminal import Table

Place = tuple[int, int, int]
"""Frame, row and column of a token."""
LEFT_OUT, IN_PART, IN_FULL = range(3)
"""The states of a block of pairs."""
HEAD_WIDTH = 64
"""The width of the queries for which a kernel is chosen."""


@dataclass(frozen=True, eq=False)
class Planned:
    """A pattern's plan for the image's tokens and `others` rows that see all.

    Args:
        seconds: that planning took.
        kernel: what executes the plan. why_not: why the pattern is switched off here; empty if it is not.
        visited: share of dense attention's blocks; of a pattern that chooses from queries and keys, of the plan that
            bounds it, what it will leave; of one pattern among a table's, its own.
        part: which of the patterns of a table this is; empty for all of a pattern.
        words: the table, a word a layer, a letter a head.
    """

    pattern: Pattern
    grid: Grid
    others: int
    plan: BlockPlan
    seconds: float
    kernel: str
    why_not: str
    visited: float
    part: str = ""
    words: tuple[str, ...] = ()

    @classmethod
    def parts(
        cls, pattern: Pattern, grid: Grid, others: int = 0, device: str | torch.device = "cpu"
    ) -> list[Self]:
        """Plan a pattern, or of a table each pattern that some head has, in the pattern's own order of tokens.

        Raises:
            ConfigError, ShapeError, CheckpointError: those of `of`; a table of another shape, or none.
        """
        if not isinstance(pattern, Searched):
            return [cls.of(pattern, grid, others, device)]
        if pattern.table:
            HeadTable.load(pattern.table).check_grid(grid)
        table, whole = pattern.read(), cls.of(pattern, grid, others, device)
        heads = [head for word in table.heads for head in word]
        mean = sum(table.density(place, grid, others) for place in range(len(table.heads))) / len(table.heads)
        why_not = pays(whole.plan, mean) if pattern.kernel == "auto" else whole.why_not
        found = []
        for letter in sorted(set(heads)):
            start = time.perf_counter()
            plan = table.letter_plan(letter, grid, others, _columns_of(table, letter))
            part = f"{heads.count(letter)} of {len(heads)} heads {PATTERNS[letter]}"
            seconds = time.perf_counter() - start
            found.append(
                replace(
                    whole,
                    why_not=why_not,
                    words=table.heads,
                    plan=plan,
                    seconds=seconds,
                    visited=plan.density,
                    part=part,
                )
            )
        return found

    @classmethod
    def of(cls, pattern: Pattern, grid: Grid, others: int = 0, device: str | torch.device = "cpu") -> Self:
        """Plan, and choose the kernel for float32 on `device`.

        Raises:
            ConfigError: the device does not have the kernel that the pattern names. ShapeError: the pattern
                cannot be had on this grid.
        """
        start = time.perf_counter()
        plan = cached_plan(pattern, grid, others)
        seconds = time.perf_counter() - start
        visited = plan.density
        if isinstance(pattern, Dynamic):
            visited = pattern.share(plan, plan.queries - others)
        if pattern.kernel == "none":
            return cls(pattern, grid, others, plan, seconds, "none", "kernel=none never skips", visited)
        q = torch.empty(1, 1, 1, HEAD_WIDTH, device=device)
        why_not = pays(plan, visited) if pattern.kernel == "auto" else ""
        kernel = choose(q, plan, pattern.kernel).kernel
        return cls(pattern, grid, others, plan, seconds, kernel, why_not, visited)

    @property
    def name(self) -> str:
        return spec(self.pattern) + (f": {self.part}" if self.part else "")

    @property
    def pairs_share(self) -> float:
        """Pairs that see each other, over those of dense attention."""
        return self.plan.pairs / (self.plan.batches * self.plan.heads * (self.grid.length + self.others) ** 2)

    @property
    def partial_share(self) -> float:
        """PARTIAL blocks, over those that are visited."""
        return self.plan.partial / max(self.plan.visited, 1)

    def seen_from(self, place: Place) -> Tensor:
        """Keys that a query of the image sees: bool [tokens], the image's, the others, then any that are added.

        Of the first head, where heads differ.
        """
        plan, side = self.plan, self.plan.block[1]
        slot = int(plan.inverse[self.token(place)])
        row, within = divmod(slot, plan.block[0])
        listed = slice(*plan.start[row : row + 2].tolist())
        pairs = plan.tiles[plan.tile[listed].long(), within]
        slots = plan.index[listed].long()[:, None] * side + torch.arange(side)
        visible = torch.zeros(plan.tokens, dtype=torch.bool)
        visible[self._tokens()[slots[pairs]]] = True
        return visible

    def token(self, place: Place) -> int:
        """Return the number of the token at (frame, row, column).

        Raises:
            ShapeError: it is not on the grid.
        """
        if any(not 0 <= at < n for at, n in zip(place, self.grid.shape, strict=True)):
            raise ShapeError(f"query {place}, expected one on the grid of {self.grid.shape} tokens")
        (frame, row, column), (_, height, width) = place, self.grid.shape
        return (frame * height + row) * width + column

    def blocks(self) -> Tensor:
        """`LEFT_OUT`, `IN_PART` or `IN_FULL` of each block: int64 [query blocks, key blocks], of the first head."""
        plan = self.plan
        rows, columns = plan.blocks
        first = slice(int(plan.start[rows]))
        found = torch.full((rows, columns), LEFT_OUT)
        found[plan.list_of[first], plan.index[first].long()] = torch.where(
            plan.tile[first] == FULL, IN_FULL, IN_PART
        )
        return found

    def _tokens(self) -> Tensor:
        """Return the token in each slot of keys, int64 [keys]; padding is -1, which nobody attends to."""
        plan = self.plan
        queries = torch.arange(plan.queries) if plan.order is None else plan.order
        return torch.cat((queries, torch.arange(len(plan.inverse), plan.tokens)))


def _columns_of(table: Searched, letter: str) -> tuple[int, ...]:
    """Find the blocks of the first striped head."""
    if letter != STRIPE or not table.columns:
        return ()
    every = ((place, head) for place, word in enumerate(table.heads) for head in range(len(word)))
    place, head = next((p, h) for p, h in every if table.heads[p][h] == letter)
    return table.columns[place][head]


def rows_of(model: Model, shape: tuple[int, ...]) -> tuple[Grid, int]:
    """Return the grid of a sample's tokens, and the number of other tokens in the longest attended sequence.

    Raises:
        ConfigError: no attention of the model runs over the rows of an image.
    """
    streams = set(attended(model.sites()).values())
    if not streams:
        raise ConfigError(
            f"{type(model).__name__} attends along one axis at a time, expected attention over all rows of an image"
        )
    layout = model.layout(shape)
    image = image_of(layout)
    longest = max(sum(segment.length for segment in sequence(layout, stream)) for stream in streams)
    return image.grid, longest - image.length


def places(grid: Grid) -> dict[str, Place]:
    """List the queries that are looked at unless others are asked for, each once."""
    frames, height, width = grid.shape
    wanted = {
        "centre": (frames // 2, height // 2, width // 2),
        "corner": (0, 0, 0),
        "border": (frames // 2, height // 2, width - 1),
    }
    return {name: at for i, (name, at) in enumerate(wanted.items()) if at not in [*wanted.values()][:i]}


def table(plans: Sequence[Planned]) -> Table:
    """Build a table of the plans for 80 columns, and below it the patterns that are off and why."""
    from rich import box

    from ditkit.core.terminal import Table

    first = plans[0]
    sizes = " x ".join(map(str, first.grid.shape[first.grid.frames == 1 :]))
    out = Table(
        title=f"{sizes} tokens and {first.others:,} others",
        caption="\n".join(f"{p.name}: off, {p.why_not}" for p in plans if p.why_not) or None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    out.add_column("pattern", max_width=24)
    for head in ("blocks\nvisited", "of them\nin part", "\npairs", "middle\nsees", "plan\nKB", "plan\ns"):
        out.add_column(head, justify="right", no_wrap=True)
    out.add_column("\nkernel", no_wrap=True)
    for p in plans:
        middle = p.seen_from(places(p.grid)["centre"])
        out.add_row(
            p.name.replace(",", ", "),
            f"{p.visited:.1%}",
            f"{p.partial_share:.1%}",
            f"{p.pairs_share:.1%}",
            f"{int(middle.sum()):,}",
            f"{p.plan.bytes() / 1e3:,.0f}",
            f"{p.seconds:.3f}",
            "off" if p.why_not else p.kernel,
        )
    return out
