"""Distillation of spans of blocks, each student from the teacher's own states (PPCL, arXiv 2511.16156).

B batch, L tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ditkit.core.errors import ConfigError
from ditkit.core.model import Model
from ditkit.core.run import Handler, Site
from ditkit.core.transform import Fed
from ditkit.nn.direction import absolute_distance, squared_distance
from ditkit.nn.feeding import before, given, needed, nothing, passed, stream_of
from ditkit.train.apart import Apart
from ditkit.train.denoising import Denoising, NoisyBatch
from ditkit.train.objective import Feed, Term
from ditkit.train.schedules import Weight
from ditkit.train.teacher import Ask, SelfTeacher, Teacher

TEACHER = SelfTeacher()
STREAMS = ("image", "text")


class Compared(NamedTuple):
    """A tap of the student and the teacher's that it learns.

    Args:
        own, taught: names of taps. stream: of what they give. kind: "student" of a span, whose squared distance counts;
            else a projection's absolute one.
    """

    own: str
    taught: str
    stream: str
    kind: str = "student"

    @property
    def name(self) -> str:
        return f"{self.own} {self.stream}"


@dataclass(frozen=True)
class SpanDistillation(Term):
    """sum over spans and streams of mean |s^ - t^|_2^2, and over projections of mean |s^ - t^|_1.

    s^ and t^ are the directions of a token of the student and of the teacher. A student is given the teacher's state
    before its span, and learns that after it; a projection, the teacher's text or the state after its attention. The
    student network is never run from end to end: what stays of it is not computed, so no student hears of another's
    errors, and the others' losses do not change with it. The loss knows directions only; `Magnitudes` follows
    |s| / |t|, which `Rescaled` can set right.

    Args:
        masked: leave padded text out of the loss, which the published code takes in.
        sequential: instead, give each student what the pruned network has before it, and let gradients run through the
            whole: what the paper compares with. Projections are still given the teacher's.
        teacher: the deep model; by default as it was before this run's transforms.
    """

    alone: ClassVar[bool] = True
    weight: Weight = 1.0
    masked: bool = False
    sequential: bool = False
    teacher: Teacher = TEACHER

    def objective(self, given: Any) -> Any:
        if not isinstance(given, Denoising):
            raise ConfigError(f"SpanDistillation: {type(given).__name__} has no noise, expected Denoising")
        return Apart(given.terms, given.timesteps, given.clock)

    def check(self, model: Model) -> str:
        return "" if fed_blocks(model) else "a model that Contiguous pruned; give that transform"

    def check_teacher(self, model: Model, teacher: Any) -> None:
        for one in fed_blocks(model):
            stack = one.block.rpartition(".")[0]
            stacked = teacher.stacks().get(stack)
            depth = len(teacher.get_submodule(stacked.path)) if stacked else 0
            if depth != one.depth:
                raise ConfigError(
                    f"SpanDistillation: the teacher has {depth} blocks on {stack!r}, the model was pruned of {one.depth}; "
                    "expected the model that it was made of (start from that with --transform, or teacher=GivenTeacher)"
                )

    def modules(self, model: Model) -> nn.Module:
        return Magnitudes(fed_blocks(model), model.sites())

    def asks(self, batch: NoisyBatch) -> Ask:
        return question(batch.own.blocks, batch.own.pairs)

    def feed(self, batch: NoisyBatch) -> Feed:
        assert batch.taught is not None
        taps = tuple(dict.fromkeys(pair.own for pair in batch.own.pairs))
        if self.sequential:
            return Feed({}, taps, {})
        return fed(batch.own.blocks, taps, batch.taught.taps, batch.sites)

    def loss(self, batch: NoisyBatch) -> Tensor:
        assert batch.taught is not None
        losses = [self.of_pair(pair, batch, batch.taught.taps) for pair in batch.own.pairs]
        return torch.stack(losses).sum(0)

    def followed(self, batch: NoisyBatch) -> Mapping[str, Tensor]:
        return {f"length {name}": batch.own.ratio[i] for name, i in batch.own.places.items()}

    def of_pair(self, pair: Compared, batch: NoisyBatch, taught: Mapping[str, Any]) -> Tensor:
        """Compute the loss of one stream of one span, or of a projection, [B]; and note how long its tokens are."""
        own, other = stream_of(batch.taps[pair.own], pair.stream), stream_of(taught[pair.taught], pair.stream)
        own = own[..., : other.shape[-1]]  # what a block hands on stands behind its text
        distance = squared_distance if pair.kind == "student" else absolute_distance
        mask = self._mask(batch, pair.stream, own)
        batch.own.note(pair.name, own, other, mask)
        error = distance(own, other)
        if mask is None:
            return error.mean(1)
        return (error * mask).sum(1) / (mask.sum() / len(mask)).clamp_min(1)

    def _mask(self, batch: NoisyBatch, stream: str, own: Tensor) -> Tensor | None:
        known = None if batch.cond is None else batch.cond.text_mask
        return known.to(own) if self.masked and stream == "text" and known is not None else None


class Magnitudes(nn.Module):
    """The mean of |s| / |t| of each student's and projection's tokens, as training goes; and the plan of what learns.

    Args:
        blocks: that learn. sites: of the pruned network.
    """

    def __init__(self, blocks: Sequence[Fed], sites: Sequence[Site], decay: float = 0.99) -> None:
        super().__init__()
        self.blocks, self.pairs, self.decay = tuple(blocks), compared(blocks, sites), decay
        self.places = {pair.name: i for i, pair in enumerate(self.pairs)}
        self.register_buffer("ratio", torch.ones(len(self.pairs)))
        self.register_buffer("seen_steps", torch.zeros(len(self.pairs), dtype=torch.long))

    @torch.no_grad()
    def note(self, name: str, own: Tensor, taught: Tensor, mask: Tensor | None = None) -> None:
        """Take in the tokens of a step, [B, L, D] each; the first steps count alike, later ones more."""
        if torch.is_inference_mode_enabled() or not self.training:
            return
        lengths = own.float().norm(dim=-1) / taught.float().norm(dim=-1).clamp_min(1e-12)
        found = lengths.mean() if mask is None else (lengths * mask).sum() / mask.sum().clamp_min(1)
        i = self.places[name]
        ratio: Any = self.ratio
        steps: Any = self.seen_steps
        share = max(1 - self.decay, 1 / (int(steps[i]) + 1))
        ratio[i] += share * (found - ratio[i])
        steps[i] += 1

    def report(self) -> dict[str, float]:
        """Return the ratios by block and stream."""
        ratio: Any = self.ratio
        return {name: float(ratio[i]) for name, i in self.places.items()}


def fed_blocks(model: Model) -> list[Fed]:
    """List what of a model learns from a teacher's states: of each stack, by the transform that came last."""
    found: dict[str, list[Fed]] = {}
    for transform in model.transforms:
        for one in transform.fed(model):
            found.setdefault(one.block.rpartition(".")[0], [])
        for stack in {one.block.rpartition(".")[0] for one in transform.fed(model)}:
            found[stack] = [one for one in transform.fed(model) if one.block.rpartition(".")[0] == stack]
    return [one for blocks in found.values() for one in blocks]


def compared(blocks: Sequence[Fed], sites: Sequence[Site]) -> tuple[Compared, ...]:
    """List what is compared: outputs of students and of blocks without MLPs, projected text, and the text handed on."""
    pairs: list[Compared] = []
    two = {site.name for site in sites if site.kind == "modulated" or site.name.endswith(".fused")}
    for one in blocks:
        joint = any(name.startswith(one.block + ".") for name in two)
        streams = STREAMS if joint and not one.reads_text else STREAMS[:1]
        if one.is_student or one.linear:
            kind = "student" if one.is_student else "linear"
            pairs += [Compared(one.block, one.last, stream, kind) for stream in streams]
        if one.reads_text:
            pairs.append(Compared(one.block + ".attn.text", one.source + ".attn.text", "text", "text"))
        if one.role == "resumed":
            pairs.append(Compared(one.block, one.group[1], "text", "text"))
    return tuple(pairs)


def question(blocks: Sequence[Fed], pairs: Sequence[Compared]) -> Ask:
    """Return the question to the teacher: states before and after spans, up to the last of them."""
    names = [pair.taught for pair in pairs]
    for one in blocks:
        names += needed(one)
    last = max((pair.taught for pair in pairs), key=_place)
    stop = ".".join(last.split(".")[:2])
    return Ask(taps=tuple(dict.fromkeys(names)), stop=stop)


def fed(blocks: Sequence[Fed], taps: Sequence[str], taught: Mapping[str, Any], sites: Sequence[Site]) -> Feed:
    """Return the handlers that give each block the teacher's state, and leave out all that does not learn."""
    learns = {one.block: one for one in blocks}
    kept: dict[str, Any] = {}
    handlers: dict[str, Handler] = {}
    for site in sites:
        if site.kind == "block":
            one = learns.get(site.name)
            handlers[site.name] = passed if one is None else partial(given, before(one, taught))
            if one is not None and one.reads_text and not (one.is_student or one.linear):
                handlers |= only_text(one.block, sites, kept)
    return Feed(handlers, tuple(tap for tap in taps if tap not in handlers or tap in learns), kept)


def only_text(block: str, sites: Sequence[Site], kept: dict[str, Any]) -> dict[str, Handler]:
    """Return handlers that compute of a block no more than its projections of the text."""
    inside = [s.name for s in sites if s.kind == "branch" and s.name.startswith(block + ".")]
    handlers: dict[str, Handler] = {name: nothing for name in inside if name != block + ".text.out"}
    text = block + ".attn.text"
    return {**handlers, block + ".attn": until, text: partial(reached, kept, text)}


class Enough(Exception):
    """The part of a branch that was wanted is there."""


def reached(kept: dict[str, Any], name: str, fn: Handler, *args: Any) -> Any:
    """Keep what a site gives, and compute nothing more of the branch."""
    kept.setdefault(name, fn(*args))
    raise Enough


def until(fn: Handler, x: Any, *args: Any) -> Any:
    """Compute a branch until enough is there; nothing is added."""
    with suppress(Enough):
        fn(x, *args)
    return nothing(fn, x)


def _place(tap: str) -> tuple[int, int]:
    """Order the blocks of a teacher: those of the stack "single" come after those of "blocks"."""
    stack, number = tap.split(".")[:2]
    return stack != "blocks", int(number)
