"""Sparse-vDiT: a table says which of five patterns each head of each layer has, for good (arXiv 2506.03065).

B batch, N heads, K head width, F frames of S tokens, n key blocks of a clip.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.attention.pattern import Layout, Pattern, SequencePlan, Sparse, append_dense_rows, sparse_sites
from ditkit.core.checkpoint import digest, read_json, write_json
from ditkit.core.codec import fingerprint
from ditkit.core.config import Checked, Count, Finite, Natural, Share, config_of
from ditkit.core.errors import CheckpointError, ConfigError, ShapeError
from ditkit.core.grid import Grid
from ditkit.core.run import Call, Handler, Site
from ditkit.ops.block_sparse_attention import BlockPlan, build_plan

Stripes = Literal["top", "first", "even"]
Columns = tuple[tuple[tuple[Natural, ...], ...], ...]
PATTERNS: Mapping[str, str] = {
    "0": "dense",
    "1": "skipped",
    "2": "diagonal",
    "3": "multi-diagonal",
    "4": "stripe",
}
"""M0 to M4 of the paper."""
DENSE, SKIPPED, DIAGONAL, MULTI, STRIPE = PATTERNS


@dataclass(frozen=True)
class HeadTable(Checked):
    """What a search found for one model, one shape and one machine.

    Args:
        model: its class. sites: digest of its attentions: their names, streams, widths and heads.
        weights: SHA-256 of the tensors that the search ran on; empty where it did not know them.
        grid: frames, rows and columns of tokens.
        heads, block, sparsity, stripes, columns: as in `Searched`.
        band: half the width of the diagonal: in frames, and in rows of the grid.
        device, threads, dtype, torch: of the machine, on which `seconds` of one layer were measured, by pattern.
        search: what the search was asked for.
        errors: of each layer, head and pattern M1 to M4, by their kind: "raw" is the MSE, "relative" its share of the
            mean square.
    """

    model: str
    sites: str
    grid: tuple[Count, Count, Count]
    heads: tuple[str, ...]
    block: Count
    sparsity: tuple[Share, Share, Share]
    stripes: Stripes
    columns: Columns = ()
    weights: str = ""
    band: tuple[Finite, Finite] = (0.0, 0.0)
    device: str = ""
    threads: Natural = 0
    dtype: str = ""
    torch: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a table.

        Raises:
            CheckpointError: there is none, or the file is something else.
        """
        given = read_json(Path(path))
        if given.pop("kind", None) != "head table":
            raise CheckpointError(f"{path}: expected a table of heads, such as `ditkit search` writes")
        return config_of(cls, given, path)

    def save(self, path: str | Path) -> Path:
        """Write the table as JSON, atomically.

        Raises:
            ConfigError: it cannot be written.
        """
        path = Path(path)
        write_json(path, {"kind": "head table", **asdict(self)})
        return path

    def check_weights(self, found: str) -> None:
        """Refuse other weights than the search ran on.

        Raises:
            ConfigError: the SHA-256 `found` is another.
        """
        if self.weights and self.weights != found:
            raise ConfigError(
                f"table of {self.model}: searched on weights {self.weights[:12]}, got {found[:12]}; search again, or "
                "say weights=any"
            )

    def check_grid(self, grid: Grid) -> None:
        """Refuse another shape than the search's.

        Raises:
            ShapeError: the grid is another.
        """
        if grid.shape != self.grid:
            given, expected = (" x ".join(map(str, shape)) for shape in (grid.shape, self.grid))
            raise ShapeError(
                f"table of {self.model}: searched on {expected} tokens, got {given}; search again"
            )


@dataclass(frozen=True)
class Searched(Pattern):
    """Sparse-vDiT. Training-free; a table gives each head of each attention one of five patterns.

    A letter is a pattern: 0 dense; 1 skipped, whose output is 0; 2 diagonal, a band in the order of frames; 3
    multi-diagonal, the same band in the order of places, where a place's tokens of all frames are neighbours; 4
    vertical stripes, key blocks that all queries see. Bands and stripes are whole blocks. Rows of text see all and
    are seen by all, but in heads that are skipped.

    Args:
        table: file of a search, which says all of the following, and `block`, and refuses another model or shape.
        heads: in place of a file: a word a layer, a letter a head: `0234+2222`. One word stands for all layers, one
            letter for all heads.
        sparsity: S_2 to S_4, the shares of a clip's blocks that patterns 2, 3 and 4 leave out at least.
        stripes: blocks of pattern 4: "top" for those of most attention, which a search finds for each head; "first"
            for those of the first frame; "even" for evenly strided ones.
        columns: of "top", the key blocks of each head of each layer; a table has them.
        weights: "same" refuses a table of other weights, where they are known: models of ours in `generate`, `compare`
            and what is made of them, not in a pipeline; "any" takes it (of the model before it was quantised, say).
    """

    table: str = ""
    heads: tuple[str, ...] = ()
    sparsity: tuple[Share, Share, Share] = (0.8, 0.8, 0.8)
    stripes: Stripes = "top"
    columns: Columns = ()
    weights: Literal["same", "any"] = "same"

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.table) == bool(self.heads):
            given = f"table={self.table} with heads={'+'.join(self.heads)}" if self.table else "neither"
            raise ConfigError(f"Searched: got {given}, expected one of table=FILE and heads=0234+2222")
        if len({len(word) for word in self.heads}) > 1:
            raise ConfigError(f"Searched: heads={'+'.join(self.heads)}, expected words of one length")
        for word in self.heads:
            if not word or set(word) - set(PATTERNS):
                raise ConfigError(f"Searched: heads={word}, expected letters of 0, 1, 2, 3 and 4")
        if self.stripes == "top" and not self.columns and any(STRIPE in word for word in self.heads):
            raise ConfigError(
                "Searched: heads with stripes=top, whose blocks a search finds; expected table=FILE, or stripes=first "
                "or even"
            )

    @classmethod
    def small(cls, grid: Grid) -> Self:
        return cls(heads=("23",), sparsity=(0.5, 0.5, 0.5), block=8, kernel="cpu")

    def check_model(self, model: Any) -> None:
        if self.table and self.weights == "same" and self.kernel != "none":
            table = HeadTable.load(self.table)
            if table.weights:
                table.check_weights(fingerprint(model.state_dict()))

    def read(self) -> Searched:
        """Return the pattern with the table in place of its file.

        Raises:
            CheckpointError: the file cannot be read.
        """
        if not self.table:
            return self
        table = HeadTable.load(self.table)
        known = ("heads", "block", "sparsity", "stripes", "columns")
        return replace(self, table="", **{name: getattr(table, name) for name in known})

    def resolved(self, sites: Sequence[Site]) -> Searched:
        """Return the pattern with the table in place of its file, a word for each attention of the model.

        Raises:
            ConfigError: the table is of another model, or has another number of layers or heads.
            CheckpointError: the file cannot be read.
        """
        if self.table and (table := HeadTable.load(self.table)).sites != sites_digest(sites):
            raise ConfigError(f"Searched: {self.table} is of {_described(table)}, got {_shape_of(sites)}")
        found = self.read()
        cores = sparse_sites(sites)
        words = found.heads * len(cores) if len(found.heads) == 1 else found.heads
        if len(words) != len(cores):
            raise ConfigError(f"Searched: heads of {len(words)} layers, got {_shape_of(sites)}")
        for site in sites:
            if site.name in cores and len(words[0]) > 1 and site.heads not in (0, len(words[0])):
                raise ConfigError(
                    f"Searched: words of {len(words[0])} heads, {site.name!r} has {site.heads} heads"
                )
        return replace(found, heads=words)

    def plan(self, grid: Grid, others: int) -> BlockPlan:
        """Build the bound: all blocks, in the order of frames."""
        return head_plan(self.block, self.sparsity, self.stripes, grid, others, DENSE, ())

    def layer_plan(self, place: int, grid: Grid, others: int) -> BlockPlan:
        """Build the plan of one attention, of each head the blocks of its pattern."""
        return head_plan(
            self.block, self.sparsity, self.stripes, grid, others, self.heads[place], self._columns(place)
        )

    def letter_plan(self, letter: str, grid: Grid, others: int, columns: tuple[int, ...] = ()) -> BlockPlan:
        """Build the plan of one pattern, in its own order, as a picture shows it."""
        slots, _ = _padded(grid, self.block)
        if letter == MULTI:
            slots = slots[space_major(grid, self.block)]
        kept = letter_blocks(self.block, self.sparsity, self.stripes, grid, letter, columns)
        order, kept = append_dense_rows(slots, kept, others, self.block)
        return build_plan(
            len(slots) + others,
            block=self.block,
            order=order,
            kept=kept & (letter != SKIPPED),
            blind=letter == SKIPPED,
        )

    def density(self, place: int, grid: Grid, others: int) -> float:
        """Return the share of dense attention's blocks that an attention visits."""
        return 1.0 if place in self.dense else self.layer_plan(place, grid, others).density

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> Sparse:
        self._check(sites, total)
        if self.kernel == "none":
            return Sparse(self, sites)
        return PerHead(self.resolved(sites), sites, HeadTable.load(self.table) if self.table else None)

    def _columns(self, place: int) -> tuple[tuple[int, ...], ...]:
        return self.columns[place] if self.columns else ()


class PerHead(Sparse):
    """One launch an attention, in which each head has lists of its own.

    Args:
        table: that the policy was read from.
    """

    policy: Searched

    def __init__(self, policy: Searched, sites: Sequence[Site], table: HeadTable | None = None) -> None:
        super().__init__(policy, sites)
        self.table = table

    def enter(self, call: Call) -> Mapping[str, Handler]:
        if all(set(word) == {DENSE} for word in self.policy.heads):
            return {}
        return super().enter(call)

    def layout(self, call: Call) -> Layout:
        found = super().layout(call)
        if self.table is not None:
            self.table.check_grid(found.image.grid)
        return found

    def remark(self, layout: Layout) -> None:
        super().remark(layout)
        self.remarks["heads"] = counted(self.policy.heads)

    def density(self, seat: SequencePlan) -> float:
        """Return the mean over attentions."""
        grid, others = self._of(seat)
        every = [self.policy.density(place, grid, others) for place in self.places.values()]
        return sum(every) / len(every)

    def is_dense(self, call: Call, name: str) -> bool:
        return super().is_dense(call, name) or set(self.policy.heads[self.places[name]]) == {DENSE}

    def attending(self, call: Call, name: str, seat: SequencePlan) -> Callable[..., Tensor]:
        place, (grid, others) = self.places[name], self._of(seat)
        word = self.policy.heads[place]
        if set(word) == {SKIPPED}:
            return _skip
        plan = self.policy.layer_plan(place, grid, others)
        moved = None
        if MULTI in word and grid.frames > 1:
            heads = (
                None if set(word) == {MULTI} else torch.tensor([i for i, m in enumerate(word) if m == MULTI])
            )
            order = F.pad(space_major(grid, self.policy.block), (0, others))
            order[order.numel() - others :] = torch.arange(order.numel() - others, order.numel())
            moved = Moved(heads, order, order.argsort())
        return partial(self.attend_heads, plan, seat, moved)

    def attend_heads(
        self,
        plan: BlockPlan,
        seat: SequencePlan,
        moved: Moved | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor | None,
    ) -> Tensor:
        """Attention by the lists of each head; those of pattern 3 have their rows in the order of places meanwhile."""
        if plan.heads not in (1, q.shape[1]):
            raise ShapeError(f"Searched: words of {plan.heads} heads, attention has {q.shape[1]} heads")
        if moved is None:
            return self.execute(plan, q, k, v, valid).out
        if valid is not None and not torch.compiler.is_compiling() and not valid[:, : len(seat.image)].all():
            raise ShapeError(
                "Searched: a mask that hides tokens of the clip, expected one that hides text alone"
            )
        q, k, v = (moved.there(x) for x in (q, k, v))
        return moved.back(self.execute(plan, q, k, v, valid).out)

    def _of(self, seat: SequencePlan) -> tuple[Grid, int]:
        return seat.grid, seat.plan.queries - seat.slots


@dataclass(frozen=True, eq=False)
class Moved:
    """Rows of some heads in another order.

    Args:
        heads: int64; None for all. order: the row of each place; inverse: the place of each row.
    """

    heads: Tensor | None
    order: Tensor
    inverse: Tensor

    def there(self, x: Tensor) -> Tensor:
        """Move rows of x [B, N, rows, K] into the other order."""
        return self._moved(x, self.order)

    def back(self, x: Tensor) -> Tensor:
        """Move them back."""
        return self._moved(x, self.inverse)

    def _moved(self, x: Tensor, order: Tensor) -> Tensor:
        order = order.to(x.device)
        if self.heads is None:
            return x[:, :, order]
        heads = self.heads.to(x.device)
        return x.index_copy(1, heads, x[:, heads][:, :, order])


def _skip(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
    return q.new_zeros(*q.shape[:3], v.shape[-1])


@lru_cache(maxsize=256)
def head_plan(
    block: int,
    sparsity: tuple[float, float, float],
    stripes: Stripes,
    grid: Grid,
    others: int,
    word: str,
    columns: tuple[tuple[int, ...], ...],
) -> BlockPlan:
    """Build the plan of heads with the patterns of a word, kept by value: layers with the same heads share one."""
    word = word[:1] if len(set(word)) == 1 and STRIPE not in word else word
    slots, _ = _padded(grid, block)
    stack = []
    for head, letter in enumerate(word):
        own = columns[head] if columns and letter == STRIPE else ()
        blocks = letter_blocks(block, sparsity, stripes, grid, letter, own)
        order, kept = append_dense_rows(slots, blocks, others, block)
        stack.append(kept & (letter != SKIPPED))
    return build_plan(
        len(slots) + others,
        block=block,
        order=order,
        kept=torch.stack(stack)[None],
        heads=len(word),
        blind=SKIPPED in word,
    )


def letter_blocks(
    block: int,
    sparsity: tuple[float, float, float],
    stripes: Stripes,
    grid: Grid,
    letter: str,
    columns: Sequence[int] = (),
) -> Tensor:
    """Compute the blocks of a clip that a pattern visits, bool [n, n], in its own order of tokens.

    Raises:
        ShapeError: a stripe's block is beyond the clip's.
    """
    _, n = _padded(grid, block)
    if letter in (DENSE, SKIPPED):
        return torch.full((n, n), letter == DENSE)
    left_out = sparsity[int(letter) - 2]
    if letter != STRIPE:
        at = torch.arange(n)
        return (at[:, None] - at).abs() <= band_reach(n, left_out)
    count = max(1, int((1 - left_out) * n + 1e-9))
    if stripes == "first":
        chosen = torch.arange(min(n, -(-grid.height * grid.width // block)))[:count]
    elif stripes == "even":
        chosen = torch.arange(count) * n // count
    else:
        chosen = torch.tensor(columns, dtype=torch.long)
        if not len(chosen) or int(chosen.amax()) >= n:
            raise ShapeError(f"Searched: stripes at blocks {list(columns)}, expected some of {n}")
    kept = torch.zeros(n, n, dtype=torch.bool)
    kept[:, chosen] = True
    return kept


def band_reach(blocks: int, left_out: float) -> int:
    """Find the greatest r for which blocks at most r apart are at most 1 - left_out of all; 0 at least."""
    reach = 0
    while reach + 1 < blocks and blocks + _beside(blocks, reach + 1) <= (1 - left_out) * blocks**2 + 1e-9:
        reach += 1
    return reach


def _beside(blocks: int, reach: int) -> int:
    """Blocks of a band off the diagonal."""
    return 2 * sum(blocks - apart for apart in range(1, reach + 1))


@lru_cache(maxsize=64)
def space_major(grid: Grid, block: int) -> Tensor:
    """Compute the slot of each place, int64: tokens by row and column, then by frame, and padding at the end."""
    _, n = _padded(grid, block)
    tokens = torch.arange(grid.length).view(grid.frames, -1).T.flatten()
    return torch.cat((tokens, torch.arange(grid.length, n * block)))


def _padded(grid: Grid, block: int) -> tuple[Tensor, int]:
    """Compute the token in each slot of a clip's whole blocks by frames, -1 for padding; and their number."""
    slots = F.pad(torch.arange(grid.length), (0, -grid.length % block), value=-1)
    return slots, len(slots) // block


def counted(words: Sequence[str]) -> str:
    """How many heads have each pattern: `3 dense, 9 diagonal`."""
    counts = Counter("".join(words))
    return ", ".join(f"{counts[letter]} {name}" for letter, name in PATTERNS.items() if counts[letter])


def sites_digest(sites: Sequence[Site]) -> str:
    """SHA-256 of a model's attentions: names, streams, widths and heads."""
    cores = sparse_sites(sites)
    return digest([[s.name, s.stream, s.width, s.heads] for s in sites if s.name in cores])


def _shape_of(sites: Sequence[Site]) -> str:
    cores = sparse_sites(sites)
    heads = sorted({site.heads for site in sites if site.name in cores})
    return f"a model of {len(cores)} attentions of {'/'.join(map(str, heads))} heads"


def _described(table: HeadTable) -> str:
    return f"{table.model} with {len(table.heads)} attentions of {len(table.heads[0])} heads"
