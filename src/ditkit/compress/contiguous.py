"""Contiguous spans of blocks, each replaced by one student, and blocks made narrower (PPCL, arXiv 2511.16156).

Blocks have two numbers: the old one, in the model that is pruned, in which everything here is said; and the new one, in
what is left. B batch, S text rows, D width.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from annotated_types import Ge
from torch import Tensor, nn

from ditkit.compress.kept import Kept
from ditkit.compress.spans import Probes, Span, choose, find_spans
from ditkit.compress.states import checked
from ditkit.compress.widths import Fits, candidates
from ditkit.core.config import Checked, Count, Fraction, Natural
from ditkit.core.errors import CheckpointError, ConfigError, unknown
from ditkit.core.loading import load
from ditkit.core.transform import Draws, Fed, Report, Transform
from ditkit.nn.narrow import Role, TwoStreams, check_linear, linear_mlps, with_linear_mlps

OTHER_NUMBERS = re.compile(r"blocks?_\d|controlnet\w*\.\d")
"""A block's number in names of other trainers, and of a ControlNet, whose layers count by rules of their own."""
HALF = 2**-8
"""The relative difference of weights that were saved in bfloat16."""


class Left(NamedTuple):
    """A block that is left: the old numbers of the blocks that it stands for, and of the one that it began as."""

    first: int
    last: int
    source: int

    @property
    def is_student(self) -> bool:
        return self.last > self.first


class Width(NamedTuple):
    """A block that is narrower, by its new number.

    Args:
        role: of its text. group: the text's group, first and last old number. linear: whether its MLPs are layers.
    """

    role: Role = "own"
    group: Span = (0, 0)
    linear: bool = False


@dataclass(frozen=True)
class Contiguous(Checked, Transform):
    """Replace each span of blocks, first and last included, by one block, and make others narrower.

    A student begins as a block of its span, and is trained by `SpanDistillation`. Any of the spans can be put back
    without training: apply those that stay to the original model, with `students` naming the pruned one.

    Args:
        spans: such as "3-5": block 3 to 5 become one, which takes the place of block 3.
        stack: whose blocks they are (`Model.stacks`); for another stack give the transform once more.
        start: the block that a student begins as: the "middle" one of its span, or the "first".
        text: groups such as "3-5" of blocks of two streams: the text is computed in block 3, and blocks 4 and 5 read
            projections of what its attention read.
        linear: blocks whose MLPs become one linear layer.
        students: a pruned model, as `ditkit.load` takes it, whose students and projections these are.
        remove: instead of spans, the number of blocks to go: spans are found from calibration.
        mlps: instead of `linear`, the number of blocks whose MLPs go: those that a linear layer stands for best.
        floor: the least CKA inside a span that is found.
        ridge: of projections; above 0 they are fitted by normal equations, which take less memory.
        steps, samples, seed: of the trajectories that a verb draws as calibration, where none is given.
    """

    spans: tuple[str, ...] = ()
    stack: str = "blocks"
    start: Literal["middle", "first"] = "middle"
    text: tuple[str, ...] = ()
    linear: tuple[Natural, ...] = ()
    students: str = ""
    remove: Natural = 0
    mlps: Natural = 0
    floor: Fraction = 0.9
    ridge: Annotated[float, Ge(0)] = 0.0
    steps: Count = 10
    samples: Count = 8
    seed: Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("spans", "text"):
            _check_ranges(name, ranges(name, getattr(self, name)))
        if list(self.linear) != sorted(set(self.linear)):
            raise ConfigError(f"Contiguous: linear={self.linear}, expected ascending numbers, each once")
        for given, instead in (("spans", "remove"), ("linear", "mlps")):
            if getattr(self, given) and getattr(self, instead):
                raise ConfigError(
                    f"Contiguous: {given}={getattr(self, given)} and {instead}={getattr(self, instead)}, expected one "
                    "of the two"
                )
        if self.students and (self.remove or self.mlps):
            raise ConfigError(
                "Contiguous: students are of spans that are named, expected neither remove nor mlps"
            )

    @property
    def cut(self) -> tuple[Span, ...]:
        """The spans as pairs of old numbers."""
        return ranges("spans", self.spans)

    @property
    def gone(self) -> int:
        """The number of blocks that go."""
        return sum(last - first for first, last in self.cut)

    def left(self, depth: int) -> list[Left]:
        """List the blocks that are left of `depth`, in order."""
        blocks, n = [], 0
        spans = dict(self.cut)
        while n < depth:
            last = spans.get(n, n)
            blocks.append(Left(n, last, (n + last) // 2 if self.start == "middle" else n))
            n = last + 1
        return blocks

    def widths(self, depth: int) -> dict[int, Width]:
        """Map the blocks that are narrower, by new number.

        Raises:
            ConfigError: a group begins or ends inside a span, or reads nothing; or a block is none that is left.
        """
        blocks = self.left(depth)
        found: dict[int, Width] = {}
        for first, last in ranges("text", self.text):
            if cut := [
                b for b in blocks if b.is_student and (b.first <= first <= b.last or b.first <= last < b.last)
            ]:
                raise ConfigError(
                    f"Contiguous: text={first}-{last} begins or ends inside the span {cut[0].first}-{cut[0].last}, "
                    "expected groups that begin at a block that stays and end at one, or at the end of a span"
                )
            reads = [j for j, b in enumerate(blocks) if first < b.first and b.last <= last]
            found[next(j for j, b in enumerate(blocks) if b.first == first)] = Width("handed", (first, last))
            found |= {j: Width("resumed" if j == reads[-1] else "read", (first, last)) for j in reads}
        for n in self.linear:
            j = next((j for j, b in enumerate(blocks) if b.first == n), None)
            if j is None:
                raise ConfigError(
                    f"Contiguous: linear={n} is no block that is left, expected one that stays or the first of a span"
                )
            found[j] = found.get(j, Width())._replace(linear=True)
        return found

    def check(self, model: Any) -> None:
        stacks = model.stacks()
        if self.stack not in stacks:
            raise ConfigError("Contiguous: " + unknown("stack", self.stack, stacks))
        stack = stacks[self.stack]
        blocks: Any = model.get_submodule(stack.path)
        depth, fixed = len(blocks), {n % len(blocks) for n in stack.shared}
        named = [
            (f"{kind}={a}-{b}", b) for kind in ("spans", "text") for a, b in ranges(kind, getattr(self, kind))
        ]
        for what, n in (*named, *((f"linear={n}", n) for n in self.linear)):
            if n >= depth:
                raise ConfigError(
                    f"Contiguous: {what} names block {n}, expected numbers of the {depth} of {self.stack!r}, 0 to "
                    f"{depth - 1}"
                )
        for first, last in (*self.cut, *((a + 1, b) for a, b in ranges("text", self.text))):
            if lost := fixed.intersection(range(first, last + 1)):
                raise ConfigError(
                    f"Contiguous: {first}-{last} takes in block {min(lost)} of {self.stack!r}, which other parts of a "
                    f"{type(model).__name__} read, or which ends the text; expected it outside"
                )
        if self.remove > depth - 1:
            raise ConfigError(f"Contiguous: remove={self.remove}, expected fewer than the {depth} blocks")
        self._check_blocks(blocks)

    def _check_blocks(self, blocks: Sequence[nn.Module]) -> None:
        for j, width in self.widths(len(blocks)).items():
            block, name = blocks[self.left(len(blocks))[j].source], f"{self.stack}.{j}"
            if width.role != "own" and (not isinstance(block, TwoStreams) or block.text_role != "own"):
                raise ConfigError(
                    f"Contiguous: text={self.text} needs blocks of two streams that have their text, as FLUX's double "
                    f"blocks, Stable Diffusion 3 and Qwen-Image have; {name} is a {type(block).__name__}"
                )
            if width.linear:
                check_linear(block, f"Contiguous: {name}")

    def draws(self) -> Draws | None:
        taken = self.students or "_pruned" in vars(self)
        needed = self.remove or self.mlps or ((self.text or self.linear) and not taken)
        return Draws(self.steps, self.samples, self.seed) if needed else None

    @property
    def is_open(self) -> bool:
        return bool(self.remove or self.mlps)

    def resolved(self, model: Any, calibration: Any = None) -> Self:
        if "_pruned" in vars(self):
            return self
        if self.students:
            pruned = load(self.students)
            check_students(self, model, pruned)
            return _carrying(replace(self, students=""), pruned=pruned)
        if self.draws() is None:
            return self
        calibration = checked(
            "Contiguous", calibration, "spans and projections are fitted", tuple(model.sample_shape)
        )
        depth = self.depth(model)
        found, notes = self, dict[str, Any]()
        if self.remove:
            fixed = {n % depth for n in model.stacks()[self.stack].shared}
            fixed.update(n for first, last in ranges("text", self.text) for n in range(first, last + 1))
            probes = Probes.fit(model, calibration, self.stack, depth)
            spans = find_spans(probes.cka, depth, self.floor, fixed)
            chosen = choose(spans, self.remove)
            found = replace(found, spans=tuple(map(written, chosen)), remove=0)
            notes["found"] = [list(span) for span in spans]
            notes["cka"] = {
                written(s): [probes.cka(*s), probes.final_cka(model, calibration, s)] for s in chosen
            }
            found.check(model)
        if self.mlps:
            errors = candidates(model, calibration, found, depth)
            if len(errors) < self.mlps:
                raise ConfigError(
                    f"Contiguous: mlps={self.mlps}, expected at most the {len(errors)} blocks that are left"
                )
            best = sorted(errors, key=lambda n: errors[n])[: self.mlps]
            found = replace(found, linear=tuple(sorted(best)), mlps=0)
            notes["mlps"] = {str(n): error for n, error in errors.items()}
        fits = Fits.of(model, calibration, found, depth) if found.text or found.linear else None
        return _carrying(found, fits=fits, notes=notes)

    def depth(self, model: Any) -> int:
        """Return the number of blocks of the stack as it is now."""
        return len(model.get_submodule(model.stacks()[self.stack].path))

    def shape(self, model: Any) -> Any:
        if self == self.exact():
            return model
        path = model.stacks()[self.stack].path
        parent, _, leaf = path.rpartition(".")
        old: Any = model.get_submodule(path)
        blocks = [old[block.source] for block in self.left(len(old))]
        for j, width in self.widths(len(old)).items():
            if width.role != "own":
                blocks[j].lose_text(width.role)
            if width.linear:
                blocks[j] = with_linear_mlps(blocks[j])
        setattr(model.get_submodule(parent), leaf, nn.ModuleList(blocks))
        return model

    def apply(self, model: Any, calibration: Any = None) -> tuple[Any, Report]:
        depth, path = self.depth(model), model.stacks()[self.stack].path
        pruned, fits = vars(self).pop("_pruned", None), vars(self).pop("_fits", None)
        notes = vars(self).pop("_notes", {})
        left = self.left(depth)
        self.shape(model)
        if fits is not None:
            fits.fill(model.get_submodule(path))
            notes["errors"] = fits.errors()
        if pruned is not None:
            take_students(self, model, pruned, depth)
        index = {str(n): j for j, block in enumerate(left) for n in range(block.first, block.last + 1)}
        return model, {"blocks": depth, "left": len(left), "index": index, **notes}

    def origin(self, name: str) -> str:
        found = re.match(re.escape(self.stack) + r"\.(\d+)(?=\.|$)(.*)", name)
        return f"{self.stack}.{self._source(int(found[1]))}{found[2]}" if found else name

    def _source(self, new: int) -> int:
        old = new
        for first, last in self.cut:
            if old < first:
                break
            if old == first:
                return (first + last) // 2 if self.start == "middle" else first
            old += last - first
        return old

    def is_last(self, model: Any) -> bool:
        """Return whether no later transform changed the stack: only then does any of it learn."""
        own = [t for t in model.transforms if isinstance(t, Contiguous | Kept) and t.stack == self.stack]
        return not own or own[-1] == self

    def fed(self, model: Any) -> list[Fed]:
        if not self.is_last(model):
            return []
        depth, at = self.depth(model) + self.gone, f"{self.stack}.{{}}".format
        widths, found = self.widths(depth), list[Fed]()
        for j, block in enumerate(self.left(depth)):
            width = widths.get(j, Width())
            names = at(block.first), at(block.last), at(block.source)
            group = () if width.role == "own" else (at(width.group[0]), at(width.group[1]))
            one = Fed(at(j), *names, width.role, group, width.linear, depth)
            if one.is_student or one.linear or one.reads_text:
                found.append(one)
        return found

    def trains(self, model: Any) -> list[str]:
        if not self.is_last(model):
            return []
        path, depth = model.stacks()[self.stack].path, self.depth(model) + self.gone
        names: list[str] = []
        widths = self.widths(depth)
        for j, block in enumerate(self.left(depth)):
            module = model.get_submodule(f"{path}.{j}")
            own = [name for name, _ in module.named_parameters()]
            if not block.is_student:
                own = projections(module) if j in widths else []
            names += [f"{path}.{j}.{name}" for name in own]
        return names

    def plain(self, model: Any) -> Mapping[str, Any] | None:
        if self.text or self.linear:
            return None
        stacked, given = model.stacks()[self.stack], json.loads(getattr(model.config, "arguments", "{}"))
        names = [model.origin(f"{self.stack}.{j}") for j in range(self.depth(model))]
        sources = [int(name.rpartition(".")[2]) for name in names]
        renumbered = {
            name: tuple(j for j, n in enumerate(sources) if n in given[name])
            for name in stacked.indexed
            if given.get(name)
        }
        return {stacked.field: len(sources), **renumbered}

    @classmethod
    def small(cls, model: Any) -> tuple[Transform, ...]:
        stack, stacked = next(iter(model.stacks().items()))
        depth = len(model.get_submodule(stacked.path))
        fixed = {n % depth for n in stacked.shared}
        free = next((n for n in range(depth - 1) if not {n, n + 1} & fixed), None)
        return (cls(spans=(written((free, free + 1)),), stack=stack),) if free is not None else (cls(),)

    def exact(self) -> Contiguous:
        return replace(self, spans=(), text=(), linear=(), remove=0, mlps=0, students="")


def ranges(name: str, texts: Sequence[str]) -> tuple[Span, ...]:
    """Read "3-5" as (3, 5).

    Raises:
        ConfigError: a text says something else.
    """
    found = []
    for text in texts:
        match = re.fullmatch(r"(\d+)-(\d+)", text)
        if not match or int(match[1]) >= int(match[2]):
            raise ConfigError(
                f"Contiguous: {name}={text!r}, expected the first and the last block of several, as 3-5"
            )
        found.append((int(match[1]), int(match[2])))
    return tuple(found)


def written(span: Span) -> str:
    """Write (3, 5) as "3-5"."""
    return f"{span[0]}-{span[1]}"


def _check_ranges(name: str, found: Sequence[Span]) -> None:
    for (first, last), (after, end) in pairwise(found):
        if after <= last:
            raise ConfigError(
                f"Contiguous: {name}={first}-{last} and {after}-{end} overlap or are not in order, expected ascending "
                "ones apart"
            )


def projections(block: Any) -> list[str]:
    """Return the names of the weights of a narrower block that are fitted and trained."""
    layers: list[Any] = [getattr(block, name, None) for name in ("text_proj", "text_resume")]
    if not isinstance(block, TwoStreams) or isinstance(
        block.get_submodule(block.mlps["image"][2]), nn.Linear
    ):
        layers += linear_mlps(block).values()
    own = {id(weight) for layer in layers if layer is not None for weight in layer.parameters()}
    return [name for name, weight in block.named_parameters() if id(weight) in own]


def pruned_by(model: Any, stack: str) -> Contiguous | None:
    """Return the last `Contiguous` that was applied to a stack."""
    return next(
        (t for t in reversed(model.transforms) if isinstance(t, Contiguous) and t.stack == stack), None
    )


def plug(
    original: Any,
    pruned: Any,
    spans: Sequence[str] | None = None,
    text: Sequence[str] | None = None,
    linear: Sequence[int] | None = None,
    stack: str = "blocks",
) -> Any:
    """Return a copy of the original model in which some spans and widths are the pruned one's; the others are original.

    With none of them the copy is the original, to the bit. None takes all of a kind; of text groups and linear layers,
    all that the blocks which are put back leave room for: a group goes with any of its blocks.

    Raises:
        ConfigError, CheckpointError: the pruned model was made of another, or has no such span or width.
    """
    own = pruned_by(pruned, stack)
    if own is None:
        raise ConfigError(
            f"plug: this {type(pruned).__name__} has no Contiguous on {stack!r}, expected a pruned model"
        )
    given = {"spans": spans, "text": text, "linear": linear}
    changed: dict[str, Any] = {name: tuple(value) for name, value in given.items() if value is not None}
    chosen = replace(own, **changed)
    if text is None or linear is None:
        chosen = _with_room(own, chosen, chosen.depth(original), text is None, linear is None)
    copy = original.with_weights(original.state_dict(), "copy")
    if chosen != chosen.exact():
        chosen.check(copy)
        check_students(chosen, copy, pruned)
        copy.transform(_carrying(replace(chosen, students=""), pruned=pruned))
    return copy


def check_students(transform: Contiguous, original: Any, pruned: Any) -> None:
    """Refuse to take students from a model that was not made of this one.

    Raises:
        ConfigError: it has other transforms, or lacks a span or a width. CheckpointError: it was made of other weights.
    """
    own = pruned_by(pruned, transform.stack)
    known = {t.stack for t in pruned.transforms if isinstance(t, Contiguous)}
    if own is None or len(known) != len(pruned.transforms) or type(pruned) is not type(original):
        listed = ", ".join(type(t).__name__ for t in pruned.transforms) or "nothing"
        raise ConfigError(
            f"Contiguous: students of a {type(pruned).__name__} under {listed}, expected a {type(original).__name__} "
            f"under one Contiguous on {transform.stack!r}; finish other transforms first (LoRA: Merged())"
        )
    for name in ("spans", "text", "linear"):
        for one in getattr(transform, name):
            if one not in getattr(own, name):
                known_ones = [str(other) for other in getattr(own, name)]
                raise ConfigError(
                    "Contiguous: " + unknown(f"one of the {name} of the pruned model", str(one), known_ones)
                )
    depth = transform.depth(original)
    if own.depth(pruned) + own.gone != depth:
        raise CheckpointError(
            f"Contiguous: the pruned model was made of {own.depth(pruned) + own.gone} blocks, the original has {depth}"
        )
    states = original.state_dict(), pruned.state_dict()
    for ours, theirs in _shared(own, original, pruned, depth):
        held, taken = states[0].get(ours), states[1].get(theirs)
        if held is None or taken is None or held.shape != taken.shape or not _same(held, taken):
            raise CheckpointError(
                f"Contiguous: {theirs!r} of the pruned model is not {ours!r} of this one: it was made of another "
                "model, or trained as a whole since; expected the model that it was made of"
            )
    _check_forms(transform, own, depth)


def _check_forms(transform: Contiguous, own: Contiguous, depth: int) -> None:
    """Refuse students and projections that the pruned model has in another form.

    Raises:
        ConfigError: names the first of them.
    """
    if lost := _without_room(own, transform, depth):
        raise ConfigError(
            f"Contiguous: {lost[0][0]}={lost[0][1]} of the pruned model was trained for other blocks than those that are "
            "left here; put it back, too, or take the spans that it covers"
        )
    there, here = _forms(own, depth), _forms(transform, depth)
    for block, form in here.items():
        if block[1] > block[0] and form != there[block]:
            raise ConfigError(
                f"Contiguous: the student of {written(block)} is not in the pruned model, where it is narrower; put the "
                "span back too, or take its text and linear layers"
            )


def _forms(transform: Contiguous, depth: int) -> dict[Span, tuple[Role, bool]]:
    """Map the blocks that are left, by first and last old number, to where their text comes from and what their MLPs are."""
    widths, forms = transform.widths(depth), dict[Span, tuple[Role, bool]]()
    for j, block in enumerate(transform.left(depth)):
        width = widths.get(j, Width())
        forms[block.first, block.last] = ("own" if width.role == "handed" else width.role, width.linear)
    return forms


def _without_room(own: Contiguous, chosen: Contiguous, depth: int) -> list[tuple[str, Any]]:
    """List the groups and linear layers of `chosen` that cover a block which the pruned model has not in this form."""
    there, here = _forms(own, depth), _forms(chosen, depth)
    lost: list[tuple[str, Any]] = []
    for text, (first, last) in zip(chosen.text, ranges("text", chosen.text), strict=True):
        if any(first < block[0] and block[1] <= last and block not in there for block in here):
            lost.append(("text", text))
    for block, (role, linear) in here.items():
        if linear and (block not in there or (role == "own") != (there[block][0] == "own")):
            lost.append(("linear", block[0]))
    return lost


def _with_room(own: Contiguous, chosen: Contiguous, depth: int, text: bool, linear: bool) -> Contiguous:
    """Leave out the groups, then the linear layers, that blocks which are put back leave no room for."""
    for name in [name for name, free in (("text", text), ("linear", linear)) if free]:
        lost = [one for kind, one in _without_room(own, chosen, depth) if kind == name]
        changed: dict[str, Any] = {name: tuple(one for one in getattr(chosen, name) if one not in lost)}
        chosen = replace(chosen, **changed)
    return chosen


def _shared(own: Contiguous, original: Any, pruned: Any, depth: int) -> list[tuple[str, str]]:
    """List tensors that pruning leaves as they are, by their names in the original and the pruned model."""
    stacks = original.stacks()
    inside = tuple(stack.path + "." for stack in stacks.values())
    pairs = [(k, k) for k in original.state_dict() if not k.startswith((*inside, "learned."))]
    path, widths = stacks[own.stack].path, own.widths(depth)
    for j, block in enumerate(own.left(depth)):
        if not block.is_student and j not in widths:
            names = original.get_submodule(f"{path}.{block.first}").state_dict()
            pairs += [(f"{path}.{block.first}.{name}", f"{path}.{j}.{name}") for name in names]
    return pairs


def _same(one: Tensor, other: Tensor) -> bool:
    one, other = one.detach().float().cpu(), other.detach().float().cpu()
    return torch.equal(one, other) or torch.allclose(one, other, rtol=HALF, atol=1e-6)


@torch.no_grad()
def take_students(transform: Contiguous, model: Any, pruned: Any, depth: int) -> None:
    """Fill students and narrower blocks from the pruned model, as `check_students` found them; the rest is original."""
    own = pruned_by(pruned, transform.stack)
    assert own is not None
    path = model.stacks()[transform.stack].path
    place = {(block.first, block.last): j for j, block in enumerate(own.left(depth))}
    widths = transform.widths(depth)
    for j, block in enumerate(transform.left(depth)):
        if not block.is_student and j not in widths:
            continue
        ours = model.get_submodule(f"{path}.{j}").state_dict()
        theirs = pruned.get_submodule(f"{path}.{place[block.first, block.last]}").state_dict()
        for name, value in ours.items():
            if block.is_student or (name in theirs and theirs[name].shape == value.shape):
                value.copy_(theirs[name])


def _carrying(transform: Any, **held: Any) -> Any:
    """Let the setting that `apply` runs under know what was fitted or loaded, which is no field of it."""
    new = replace(transform)
    for name, value in held.items():
        vars(new)["_" + name] = value
    return new


def renumbered(state: Mapping[str, Tensor], transform: Contiguous, path: str) -> dict[str, Tensor]:
    """Return tensors made for the original, such as a LoRA's of diffusers or PEFT, under the new numbers.

    What belongs to blocks that are gone, or that became students, is left out.

    Args:
        path: of the stack in the names, such as "transformer_blocks".

    Raises:
        ConfigError: a name has a block's number in another form, as a ControlNet's or other trainers' have.
    """
    pattern = re.compile(r"(^|.*?\.)" + re.escape(path) + r"\.(\d+)\.(.*)")
    found = {}
    for name, value in state.items():
        match = pattern.match(name)
        if not match:
            if OTHER_NUMBERS.search(name):
                raise ConfigError(
                    f"renumbered: {name!r} has a block's number in another form, expected {path}.NUMBER.NAME"
                )
            found[name] = value
            continue
        old = int(match[2])
        if not any(first <= old <= last for first, last in transform.cut):
            new = old - sum(last - first for first, last in transform.cut if last < old)
            found[f"{match[1]}{path}.{new}.{match[3]}"] = value
    return found
