"""Learned depth (TinyFusion, arXiv 2412.01199): which blocks to keep, found by training logits of the choices.

A run trains a model under `LearnedDepth`, its weights beside the logits, so that a choice is judged by what is left
after training. `decide` reads off the blocks, and `Kept` takes them from the model as it was before the search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from math import comb, isfinite
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ditkit.compress.kept import Kept
from ditkit.core.config import Count
from ditkit.core.errors import ConfigError, ShapeError, unknown
from ditkit.core.grid import Grid
from ditkit.core.model import Model
from ditkit.core.policy import Claim, Policy, Session
from ditkit.core.run import Call, Handler, Site

MOST = 2**16
"""Choices of a group that are listed; the paper's largest group, 7 of 14, has 3,432."""


@dataclass(frozen=True)
class LearnedDepth(Policy):
    """Every sample of a training batch passes a choice of blocks of its own, drawn by a Gumbel softmax of logits.

    The stack is cut into groups, in order; `keep[k]` of the `of[k]` blocks of group k stay. In training
    x <- m block(x) + (1 - m) x with m of 0 or 1, straight through (section 3.2): all blocks are computed. In evaluation
    the likeliest choice runs, and the other blocks do not.

    Args:
        keep: of each group, blocks that stay; none keeps all of the stack.
        of: of each group, its size; none is one group of all. Both are repeated to the end of the stack.
        stack: whose blocks they are (`Model.stacks`).
        first, scale: a logit's value at first, and what it is multiplied by; a learning rate of 1e-3 goes with 100.
        hot, cold: temperature of the softmax at the first step and the last, in a straight line between.
        steps: of the run.
    """

    inherent: ClassVar[bool] = True
    keep: tuple[Count, ...] = (1,)
    of: tuple[Count, ...] = (2,)
    stack: str = "blocks"
    first: float = 0.02
    scale: float = 100.0
    hot: float = 4.0
    cold: float = 0.1
    steps: Count = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep and len(self.keep) != max(len(self.of), 1):
            raise ConfigError(
                f"LearnedDepth: keep={self.keep} of={self.of}, expected as many of each, or one group of all"
            )
        if self.of and any(kept > size for kept, size in zip(self.keep, self.of, strict=False)):
            raise ConfigError(f"LearnedDepth: keep={self.keep}, expected no more than of={self.of}")
        if not (isfinite(self.hot) and self.hot >= self.cold > 0):
            raise ConfigError(f"LearnedDepth: hot={self.hot} and cold={self.cold}, expected hot >= cold > 0")

    def claims(self, sites: Sequence[Site]) -> Mapping[str, Claim]:
        return dict.fromkeys(self.blocks(sites), "wrap")

    def blocks(self, sites: Sequence[Site]) -> list[str]:
        """Names of the stack's blocks, in the order of the call.

        Raises:
            ConfigError: there is no such stack.
        """
        names = [site.name for site in sites if site.kind == "block"]
        stacks = dict.fromkeys(name.rpartition(".")[0] for name in names)
        if self.stack not in stacks:
            raise ConfigError("LearnedDepth: " + unknown("stack", self.stack, stacks))
        return [name for name in names if name.rpartition(".")[0] == self.stack]

    def groups(self, depth: int) -> list[tuple[int, int]]:
        """Of each group, how many blocks are kept and its size.

        Raises:
            ConfigError: the groups do not make up the depth, or one has too many choices.
        """
        if not self.keep:
            return []
        sizes = self.of or (depth,)
        times, left = divmod(depth, sum(sizes))
        if left:
            raise ConfigError(
                f"LearnedDepth: of={self.of} does not make up the {depth} blocks of {self.stack!r}, expected sizes "
                "whose sum divides it"
            )
        found = list(zip(self.keep, sizes, strict=True)) * times
        for kept, size in found:
            if kept > size or comb(size, kept) > MOST:
                raise ConfigError(
                    f"LearnedDepth: keep={kept} of={size} blocks are {comb(size, kept):,} choices, expected 1 to "
                    f"{MOST:,}; cut the stack into more groups"
                )
        return found

    def modules(self, sites: Sequence[Site]) -> nn.ModuleDict | None:
        groups = self.groups(len(self.blocks(sites)))
        return nn.ModuleDict({"all": Gates(groups, self.first, self.scale)}) if groups else None

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> Session:
        known: Any = self.modules(sites) if modules is None else modules
        if modules is None and known is not None:
            known.eval()  # logits that nobody trains
        return DepthSearch(self, self.blocks(sites), None if known is None else known["all"])

    def tau(self, step: int) -> float:
        """Return the temperature at a step, counted from 0."""
        done = min(step / max(self.steps - 1, 1), 1.0)
        return self.hot + (self.cold - self.hot) * done

    def exact(self) -> LearnedDepth:
        return self if self.keep == self.of else replace(self, keep=(), of=())

    @classmethod
    def small(cls, grid: Grid) -> LearnedDepth:
        return cls(keep=(1,), of=())


class Gates(nn.Module):
    """Logits of the choices of each group, and the choices [C, M] as rows of zeros and ones, in lexicographic order."""

    def __init__(self, groups: Sequence[tuple[int, int]], first: float, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.logits = nn.ParameterList()
        for k, (kept, size) in enumerate(groups):
            self.logits.append(nn.Parameter(torch.full((comb(size, kept),), first)))
            self.register_buffer(f"choices_{k}", choices(kept, size))

    def options(self) -> list[Tensor]:
        """Return the choices of each group, bool [C, M]."""
        return [getattr(self, f"choices_{k}") for k in range(len(self.logits))]

    def draw(self, batch: int, tau: float) -> Tensor:
        """Masks [batch, blocks] of exact zeros and ones, with the gradient of the soft choice at temperature tau."""
        masks = []
        with torch.autocast(self.logits[0].device.type, enabled=False):
            for logits, options in zip(self.logits, self.options(), strict=True):
                scaled = (logits * self.scale).expand(batch, -1)
                soft = ((scaled + gumbel(scaled)) / tau).softmax(-1)
                hard = F.one_hot(soft.argmax(-1), soft.shape[1]).to(soft.dtype)
                masks.append((hard + (soft - soft.detach())) @ options.to(soft.dtype))
        return torch.cat(masks, 1)

    def kept(self) -> list[int]:
        """Numbers of the blocks of the likeliest choices."""
        best = [options[logits.argmax()] for logits, options in zip(self.logits, self.options(), strict=True)]
        found: list[int] = torch.cat(best).nonzero().flatten().tolist()
        return found

    def confidence(self) -> list[float]:
        """Return the probability of each group's likeliest choice."""
        return [(logits.detach() * self.scale).softmax(-1).max().item() for logits in self.logits]


class DepthSearch(Session):
    """The masks of each call in training; in evaluation which blocks run."""

    verb: ClassVar[str] = "skipped"

    def __init__(self, policy: LearnedDepth, names: Sequence[str], gates: Gates | None) -> None:
        super().__init__()
        self.policy, self.names, self.gates = policy, names, gates
        kept = range(len(names)) if gates is None or gates.training else gates.kept()
        self.dropped = tuple(name for i, name in enumerate(names) if i not in kept)

    def enter(self, call: Call) -> Mapping[str, Handler]:
        if self.gates is None or not self.gates.training:
            return dict.fromkeys(self.dropped, passed)
        masks = self.gates.draw(len(call.times), self.policy.tau(call.step or 0))
        return {name: partial(gated, mask) for name, mask in zip(self.names, masks.unbind(1), strict=True)}


class Decision(NamedTuple):
    """What a search found.

    Args:
        kept: the transform that makes the shallower model of the one before the search.
        confidence: of each group, the probability of its choice.
    """

    kept: Kept
    confidence: tuple[float, ...]


def decide(searched: Model) -> Decision:
    """Return the likeliest choice of each group of a model that was trained under `LearnedDepth`.

    What training saves has averaged logits, by which the paper decides, too. The weights of a search only stand for
    later training: apply `kept` to the model that the search began with.

    Raises:
        ConfigError: the model was not trained under it.
    """
    policy = next((p for p in searched.policies if isinstance(p, LearnedDepth)), None)
    if policy is None or not policy.keep:
        raise ConfigError(f"decide: this {type(searched).__name__} was not trained under LearnedDepth")
    gates: Any = searched.learned[LearnedDepth.__name__]
    gates = gates["all"]
    return Decision(Kept(tuple(gates.kept()), policy.stack), tuple(gates.confidence()))


def choices(kept: int, size: int) -> Tensor:
    """Every choice of `kept` of `size` blocks, bool [C(size, kept), size], in lexicographic order."""
    index = torch.tensor(list(combinations(range(size), kept)))
    rows = torch.zeros(len(index), size, dtype=torch.bool)
    return rows.scatter_(1, index.to(rows.device), True)


def gumbel(like: Tensor) -> Tensor:
    """Draw standard Gumbel noise of the shape of `like`."""
    return -torch.empty_like(like).exponential_().log()


def gated(mask: Tensor, fn: Handler, x: Any, *args: Any) -> Any:
    """m fn(x) + (1 - m) x of every sample; two streams have one mask. In this form m = 0 and m = 1 are exact.

    Raises:
        ShapeError: the block has another batch axis than the call.
    """

    def mixed(new: Tensor, old: Tensor) -> Tensor:
        if len(new) != len(mask):
            raise ShapeError(f"LearnedDepth: a block of {len(new)} rows of samples, expected {len(mask)}")
        m = mask.to(new.dtype).view(-1, *[1] * (new.ndim - 1))
        return m * new + (1 - m) * old

    return tree_map(mixed, fn(x, *args), x)


def passed(fn: Handler, x: Any, *args: Any) -> Any:
    """Stand for a block that is not there."""
    return x
