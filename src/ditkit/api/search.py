"""The search of Sparse-vDiT: which pattern each head can do with, and what it saves on this machine.

B batch, N heads, K head width, n key blocks of a clip.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal, Self

import torch
from annotated_types import Ge
from torch import Tensor, nn

from ditkit.attention.pattern import Pattern, SequencePlan, Sparse, run_dense, run_sparse
from ditkit.attention.searched import (
    DENSE,
    PATTERNS,
    STRIPE,
    HeadTable,
    PerHead,
    Searched,
    Stripes,
    band_reach,
    head_plan,
    letter_blocks,
    sites_digest,
)
from ditkit.bench.origin import device
from ditkit.bench.timing import alternated, medians
from ditkit.core.codec import fingerprint
from ditkit.core.config import Checked, Finite, Share
from ditkit.core.errors import ConfigError, NoEffectError
from ditkit.core.grid import Grid
from ditkit.core.model import Denoiser
from ditkit.core.policy import Policy
from ditkit.core.run import Call, Handler, Site
from ditkit.ops.block_sparse_attention import BlockPlan
from ditkit.sample import Sampler, Sampling
from ditkit.sample.guidance import Guidance
from ditkit.sample.solvers import Solver

Kind = Literal["relative", "raw"]
Cost = Literal["measured", "sparsity"]
KINDS: tuple[Kind, ...] = ("raw", "relative")
CANDIDATES = tuple(letter for letter in PATTERNS if letter != DENSE)
SCORES = 2**24
"""Scores that are made at once where the attention of key blocks is summed: 64 MB in float32."""


@dataclass(frozen=True, kw_only=True)
class Objective(Checked):
    """What a head's pattern is chosen by: the least of error + weight cost, dense where all are above epsilon.

    Args:
        weight: lambda of the paper.
        epsilon: the greatest error + weight cost of a pattern that is taken; the paper's 1 is of raw errors, whose
            scale it does not say. Of relative errors a head that is skipped has exactly 1.
        error: "relative" divides the squared error of a head's output by its square; "raw" is its mean, the paper's.
        cost: "measured" is a pattern's time over that of dense attention on this machine; "sparsity" is 1 - S, the
            paper's formula.
        target: in place of epsilon, the least share of blocks that the table should leave out; 0 for none.
    """

    weight: Annotated[float, Ge(0)] = 0.5
    epsilon: Finite = 0.5
    error: Kind = "relative"
    cost: Cost = "measured"
    target: Share = 0.0

    def letters(self, errors: Tensor, costs: Tensor, sparsity: Tensor) -> Tensor:
        """Choose the pattern of each head, int64 [layers, N] in 0 to 4.

        Args:
            errors: [layers, N, 4], of M1 to M4. costs, sparsity: [4].

        Raises:
            ConfigError: no table leaves out as much as the target.
        """
        losses = errors + self.weight * costs
        least, best = losses.min(-1)
        epsilon = self.epsilon if not self.target else self._reaching(least, sparsity[best])
        return torch.where(least > epsilon, 0, best + 1)

    def _reaching(self, least: Tensor, left_out: Tensor) -> float:
        """Find the least epsilon with which heads leave out `target` on the average."""
        order = least.flatten().argsort(stable=True)
        reached = left_out.flatten()[order].cumsum(0) / least.numel()
        enough = (reached >= self.target - 1e-12).nonzero()
        if not len(enough):
            raise ConfigError(
                f"search: target={self.target:g}, expected at most {reached[-1].item():.3g}, what all heads leave out"
            )
        return least.flatten()[order][int(enough[0])].item()


@dataclass(eq=False)
class Evidence:
    """What was met on the way, summed over evaluations and guidance branches."""

    grid: Grid | None = None
    heads: int = 0
    dtype: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of one attention with all heads alike, by pattern."""
    sums: dict[int, Tensor] = field(default_factory=dict)
    """By attention: float64 [2, N, 4], raw and relative errors of M1 to M4."""
    counts: dict[int, int] = field(default_factory=dict)
    mass: dict[int, Tensor] = field(default_factory=dict)
    """By attention: attention that each key block gets, float64 [N, n]."""

    def mean(self, place: int) -> Tensor:
        return self.sums[place] / self.counts[place]

    def errors(self, kind: Kind) -> Tensor:
        """[layers, N, 4]."""
        return torch.stack([self.mean(place)[KINDS.index(kind)] for place in sorted(self.sums)])

    def costs(self, objective: Objective, sparsity: Tensor) -> Tensor:
        """[4], of M1 to M4."""
        if objective.cost == "sparsity":
            return 1 - sparsity
        return torch.tensor([self.seconds[m] / self.seconds[DENSE] for m in CANDIDATES], dtype=torch.float64)

    def columns(self, sparsity: float) -> dict[int, tuple[tuple[int, ...], ...]]:
        """Return the key blocks of most attention, of each head by attention."""
        found = {}
        for place, mass in self.mass.items():
            count = max(1, int((1 - sparsity) * mass.shape[1] + 1e-9))
            best = mass.topk(count).indices.sort().values
            found[place] = tuple(map(tuple, best.tolist()))
        return found


@dataclass(frozen=True)
class Searching(Pattern):
    """A sampler's run in which every attention weighs all patterns, with the kernel that will run them.

    Args:
        sparsity, stripes: as in `Searched`.
        objective: what the next layer's input is chosen by.
        follow: "sparse" goes on with the output of the pattern that is best so far, as the paper's figure has it;
            "dense" with dense attention's, so that errors do not build up.
        columns: blocks of stripes, by attention; none: their attention is summed, and nothing else done.
        evidence: where it is gathered.
    """

    sparsity: tuple[Share, Share, Share] = (0.8, 0.8, 0.8)
    stripes: Stripes = "top"
    objective: Objective = field(default_factory=Objective)
    follow: Literal["sparse", "dense"] = "sparse"
    columns: Mapping[int, tuple[tuple[int, ...], ...]] | None = None
    evidence: Evidence = field(default_factory=Evidence, compare=False)

    __hash__ = object.__hash__

    @classmethod
    def small(cls, grid: Grid) -> Self:
        return cls(block=8, kernel="cpu")

    def exact(self) -> Self:
        """Itself: it is there to weigh, and nobody is told that it saves anything."""
        return self

    def plan(self, grid: Grid, others: int) -> BlockPlan:
        return head_plan(self.block, self.sparsity, "even", grid, others, DENSE, ())

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> Weighing:
        return Weighing(self, sites)


class Weighing(Sparse):
    """The evidence of one trajectory."""

    policy: Searching

    def off(self, layout: Any) -> str:
        return ""

    def handler(self, call: Call, name: str, seat: SequencePlan) -> Handler:
        evidence = self.policy.evidence
        if evidence.grid not in (None, seat.grid):
            raise ConfigError(
                f"search: a clip of {seat.grid.shape} tokens after one of {evidence.grid.shape}, expected one shape"
            )
        evidence.grid = seat.grid
        if self.policy.columns is None:
            return partial(self.sum_mass, self.places[name], seat)
        return partial(self.weigh, self.places[name], call, name, seat)

    def sum_mass(
        self, place: int, seat: SequencePlan, fn: Handler, q: Tensor, k: Tensor, v: Tensor, *masks: Tensor
    ) -> Tensor:
        """Dense attention, and what each key block of the clip gets of it."""

        def attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
            summed = key_mass(seat, q, k, valid).double().sum(0).cpu()
            held[place] = held.get(place, torch.zeros_like(summed)) + summed
            return q

        held = self.policy.evidence.mass
        run_sparse(seat, attend, fn, q, k, v, *masks)  # for the order of its rows
        return run_dense(seat, fn, q, k, v, *masks)

    def weigh(
        self,
        place: int,
        call: Call,
        name: str,
        seat: SequencePlan,
        fn: Handler,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *masks: Tensor,
    ) -> Tensor:
        """Errors of all patterns, head by head; returns what the next layer is to see."""
        runs: dict[str, Callable[[], Tensor]] = {DENSE: partial(run_dense, seat, fn, q, k, v, *masks)}
        for letter in CANDIDATES:
            attend = self._of(letter, place, q.shape[1]).attending(call, name, seat)
            runs[letter] = partial(run_sparse, seat, attend, fn, q, k, v, *masks)
        evidence = self.policy.evidence
        if not evidence.seconds:
            evidence.seconds = medians(alternated(runs, rounds=3))
            evidence.heads, evidence.dtype = q.shape[1], str(q.dtype).removeprefix("torch.")
        outs = {letter: run() for letter, run in runs.items()}
        raw, relative = head_errors(outs, seat)
        sums = torch.stack((raw, relative))
        evidence.sums[place] = evidence.sums.get(place, torch.zeros_like(sums)) + sums
        evidence.counts[place] = evidence.counts.get(place, 0) + 1
        if self.policy.follow == "dense":
            return outs[DENSE]
        chosen = self._best_so_far(place, seat).to(q.device)
        stack = torch.stack([outs[letter] for letter in PATTERNS])
        return stack[chosen, :, torch.arange(len(chosen), device=q.device)].transpose(0, 1)

    def _of(self, letter: str, place: int, heads: int) -> PerHead:
        """Start a session of a table in which all heads have one pattern: the code that will run."""
        policy, columns = self.policy, ()
        if letter == STRIPE and policy.stripes == "top":
            assert policy.columns is not None
            columns = tuple(policy.columns[i] if i == place else () for i in range(len(self.places)))  # type: ignore[assignment]
        searched = Searched(
            heads=(letter * heads,) * len(self.places),
            sparsity=policy.sparsity,
            stripes=policy.stripes if letter == STRIPE else "even",
            columns=columns,
            block=policy.block,
            kernel=policy.kernel,
        )
        session = PerHead(searched, ())
        session.places, session.streams = self.places, self.streams
        return session

    def _best_so_far(self, place: int, seat: SequencePlan) -> Tensor:
        policy, evidence = self.policy, self.policy.evidence
        errors = evidence.mean(place)[KINDS.index(policy.objective.error)]
        sparsity = left_out(policy, seat.grid)
        objective = replace(policy.objective, target=0.0)
        return objective.letters(errors, evidence.costs(objective, sparsity), sparsity)


def head_errors(outs: Mapping[str, Tensor], seat: SequencePlan) -> tuple[Tensor, Tensor]:
    """Mean squared errors of M1 to M4 and their shares of the mean square, head by head: float64 [N, 4] each.

    Over the rows that are no padding; of a head whose output is 0, a share is 0.
    """
    rows = slice(None) if seat.real is None else seat.real.to(outs[DENSE].device)
    exact = outs[DENSE][:, :, rows].double()
    square = exact.square().mean((0, 2, 3))
    raw = torch.stack(
        [(outs[m][:, :, rows].double() - exact).square().mean((0, 2, 3)) for m in CANDIDATES], -1
    )
    relative = (raw / square[:, None]).nan_to_num(0.0)
    return raw.cpu(), relative.cpu()


def key_mass(seat: SequencePlan, q: Tensor, k: Tensor, valid: Tensor | None) -> Tensor:
    """Attention that each key block of the clip gets of all queries, [B, N, n], without making all scores at once."""
    plan = seat.plan
    order = torch.arange(plan.queries) if plan.order is None else plan.order
    seen = (order >= 0)[None].expand(len(q), -1).clone()
    if valid is not None:
        held = (order >= 0) & (order < valid.shape[1])
        seen[:, held] &= valid.cpu()[:, order[held]]
    hidden = ~seen.to(q.device)[:, None, None]
    real = (order >= 0).to(q.device)
    total = q.new_zeros(*q.shape[:2], k.shape[2], dtype=torch.float32)
    step = max(1, SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    for rows in torch.arange(q.shape[2]).split(step):
        scores = (q[:, :, rows] @ k.mT).float() * q.shape[-1] ** -0.5
        weight = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        total += (weight * real[rows.to(q.device), None]).sum(2)
    return total[:, :, : seat.slots].unflatten(2, (-1, plan.block[1])).sum(3)


def left_out(policy: Searching | Searched, grid: Grid) -> Tensor:
    """S of M1 to M4: the shares of a clip's blocks that they leave out, as the blocks have it; float64 [4]."""
    stripes: Stripes = "even" if policy.stripes == "top" else policy.stripes  # as many
    kept = [letter_blocks(policy.block, policy.sparsity, stripes, grid, letter) for letter in CANDIDATES]
    return 1 - torch.stack([blocks.double().mean() for blocks in kept])


def search_by(
    draw: Callable[[Policy], object],
    sites: Sequence[Site],
    *,
    model: str = "",
    weights: str = "",
    **setting: Any,
) -> HeadTable:
    """Search with any sampler: it is run once for the blocks of stripes, and once to weigh patterns.

    Args:
        draw: runs the sampler under a policy: `lambda policy: ditkit.accelerate(pipe, policy)(prompt)`.
        sites: of the model. model, weights: its name, and the SHA-256 of its tensors.
        setting: fields of `Objective` and of `Searching`.

    Raises:
        ConfigError: an unknown setting, clips of several shapes, or a target that no table reaches.
        NoEffectError: no attention was met.
    """
    known = set(Objective.__dataclass_fields__)
    objective = Objective(**{name: given for name, given in setting.items() if name in known})
    given = {name: value for name, value in setting.items() if name not in known}
    policy = Searching(objective=objective, **given)
    columns: Mapping[int, tuple[tuple[int, ...], ...]] = {}
    if policy.stripes == "top":
        draw(policy)
        columns = policy.evidence.columns(policy.sparsity[2])
    policy = replace(policy, columns=columns, evidence=Evidence())
    draw(policy)
    if policy.evidence.grid is None or not policy.evidence.sums:
        raise NoEffectError("search: the sampler met no attention of the model")
    return _table(policy, columns, sites, model, weights)


def search(
    model: Denoiser,
    seeds: Sequence[int] = (0, 1, 2, 3),
    *,
    label: int | str | Sequence[int | str] | None = None,
    steps: int = 10,
    guidance: float | Guidance = 2.0,
    solver: Solver | str | None = None,
    batch_size: int = 4,
    **setting: Any,
) -> HeadTable:
    """Search the table of a model of ours.

    Args:
        seeds, label, steps, guidance, solver, batch_size: of the samples on which it is calibrated, both guidance
            branches alike.
        setting: fields of `Objective` (`epsilon=0.3`) and of `Searching` (`block=16`).

    Raises:
        ConfigError, NoEffectError: those of `search_by`, and of `ditkit.generate`.
    """
    settings = Sampling(steps, solver, guidance, batch_size=batch_size, seeds=tuple(seeds))  # type: ignore[arg-type]
    sampler = Sampler.of(model, label, sampling=settings)
    found = search_by(
        lambda policy: sampler.draw(policies=policy),
        model.sites(),
        model=type(model).__name__,
        weights=fingerprint(model.state_dict()),
        **setting,
    )
    sampled = {"seeds": list(sampler.sampling.seeds), "steps": steps}
    return replace(found, search={**found.search, **sampled})


def _table(
    policy: Searching,
    columns: Mapping[int, tuple[tuple[int, ...], ...]],
    sites: Sequence[Site],
    model: str,
    weights: str,
) -> HeadTable:
    evidence, grid = policy.evidence, policy.evidence.grid
    assert grid is not None
    sparsity, objective = left_out(policy, grid), policy.objective
    letters = objective.letters(
        evidence.errors(objective.error), evidence.costs(objective, sparsity), sparsity
    )
    n = -(-grid.length // policy.block)
    reach = (band_reach(n, policy.sparsity[0]) + 0.5) * policy.block
    return HeadTable(
        model=model or "model",
        sites=sites_digest(sites),
        weights=weights,
        grid=grid.shape,
        heads=tuple("".join(map(str, row)) for row in letters.tolist()),
        block=policy.block,
        sparsity=policy.sparsity,
        stripes=policy.stripes,
        columns=tuple(columns[place] for place in sorted(columns)),
        band=(reach / (grid.height * grid.width), reach / grid.width),
        device=device(),
        threads=torch.get_num_threads(),
        dtype=evidence.dtype,
        torch=torch.__version__,
        seconds=evidence.seconds,
        search={**asdict(objective), "follow": policy.follow, "evaluations": evidence.counts[0]},
        errors={kind: evidence.errors(kind).tolist() for kind in KINDS},
    )
