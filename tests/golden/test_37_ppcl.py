"""PPCL's distillation, least squares, numbers of projections and exports against OPPO-Mente-Lab/Qwen-Image-Pruning."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import formula
from ditkit.compress import Contiguous, Kept
from ditkit.compress.cka import fit_affine
from ditkit.compress.contiguous import _check_forms, _with_room, projections, written
from ditkit.compress.states import record
from ditkit.core.errors import ConfigError
from ditkit.core.run import DIRECT
from ditkit.hosts.hosted import Host, HostConfig
from ditkit.nn.direction import absolute_distance
from ditkit.nn.narrow import linear_mlps
from ditkit.train.taps import Around, Tap
from ditkit.train.teacher import Answer
from ditkit.train.terms.span_distillation import SpanDistillation
from golden_support import Case, assert_golden, cases, float64, read

SYSTEM = "37-ppcl"
QWEN = "QwenImageTransformer2DModel"
LISTS = read(SYSTEM)["numbers of projections"]
SPANS = tuple(map(written, LISTS["layer_indexs"]))
GROUPS = tuple(map(written, LISTS["ehs_same"]))
EXPORT = Contiguous(spans=SPANS, text=GROUPS[3:], linear=(2, 58, 59))
"""The three groups and the three blocks of the 10B export."""
TOLERANCE = 1e-6
"""Rotary frequencies are complex64, as published."""


def on_meta(*transforms: Any) -> Host:
    with torch.device("meta"):
        return Host(HostConfig(QWEN)).shaped(transforms)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def numbers(blocks: Any, name: str) -> list[int]:
    return [j for j, block in enumerate(blocks) if hasattr(block, name)]


def network(case: Case, spans: tuple[str, ...] = ()) -> Host:
    with float64():
        model = Host(HostConfig(QWEN, json.dumps(case["constructor"])))
    state = model.transformer.state_dict()
    model.transformer.load_state_dict({name: formula.weight(name, v.shape) for name, v in state.items()})
    if spans:
        model.transform(Contiguous(spans=spans))
    return model.eval()


def move_students(model: Host, places: list[int]) -> None:
    for number, place in enumerate(places):
        for name, p in model.transformer.transformer_blocks[place].named_parameters():
            key = f"student.{number}.{name}"
            drift = 0.3 * formula.weight(key, p.shape) if p.ndim == 2 else 0.1 * formula.tensor(key, p.shape)
            p.data += drift


@cases(SYSTEM, lambda case: "per_span_text_and_image" in case["results"])
def test_each_student_learns_from_the_teachers_states(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    teacher = network(case).requires_grad_(False)
    pairs = json.loads(case["name"].split("spans ")[1].split(" of")[0])
    student = network(case, tuple(map(written, pairs)))
    transform = student.transforms[0]
    places = [j for j, b in enumerate(transform.left(case["constructor"]["num_layers"])) if b.is_student]
    assert [transform.left(8)[j].source for j in places] == case["results"]["student_copied_from_block"]
    move_students(student, places)
    image, text = (formula.tensor(name, shape) for name, shape in case["inputs"].items())
    call = {
        "hidden_states": image,
        "encoder_hidden_states": text,
        "timestep": torch.tensor(case["timestep"], dtype=torch.float64),
        "img_shapes": [[tuple(case["image_grid"])]] * len(image),
        "return_dict": False,
    }
    term = SpanDistillation()
    own = term.modules(student).eval()
    ask = term.asks(SimpleNamespace(own=own))
    taught = record(teacher, call, (*ask.taps, "time"))
    batch = SimpleNamespace(own=own, taught=Answer(None, taught), sites=student.sites(), cond=None, taps={})
    feed = term.feed(batch)
    tap = Tap(feed.taps, Around(DIRECT, feed.handlers))
    student(**call, run=tap)
    batch.taps = tap.recorded
    found = [term.of_pair(pair, batch, taught).mean() for pair in own.pairs]
    expected = [loss for both in case["results"]["per_span_text_and_image"] for loss in reversed(both)]
    assert [loss.item() for loss in found] == pytest.approx(expected, rel=TOLERANCE)
    loss = term.loss(batch).mean()
    assert loss.item() == pytest.approx(case["results"]["loss"], rel=TOLERANCE)
    loss.backward()
    blocks = student.transformer.transformer_blocks
    norms = [
        torch.stack([p.grad.norm() for p in blocks[j].parameters() if p.grad is not None]).norm()
        for j in places
    ]
    assert [norm.item() for norm in norms] == pytest.approx(
        list(case["results"]["gradient_norms"].values()), rel=1e-5
    )
    assert all(p.grad is None for j, b in enumerate(blocks) if j not in places for p in b.parameters())
    with torch.no_grad():
        out = teacher.transformer._head(taught[own.blocks[-1].last].image, taught["time"])
    assert_golden(out, case["results"]["output_after_the_last_span"], TOLERANCE)
    assert ask.stop == own.blocks[-1].last


def test_least_squares_and_the_loss_of_projections() -> None:
    case = read(SYSTEM)["least squares start of a projection; loss of width distillation"]
    x, y = (
        torch.sin(torch.arange(n, dtype=torch.float64) ** 2 + more) for n, more in ((100, 0.0), (60, 1.0))
    )
    x, y = x.view(20, 5), y.view(20, 3)
    fitted = fit_affine(x, y)
    assert_golden(fitted.weight, case["results"]["weight"])
    assert fitted.bias.tolist() == pytest.approx(case["results"]["bias"], rel=1e-9)
    assert absolute_distance(fitted(x), y).mean().item() == pytest.approx(case["results"]["tsn_l1"], rel=1e-9)
    assert (fitted(x) - y).square().sum().item() == pytest.approx(case["results"]["l2_residual"], rel=1e-9)


@cases(SYSTEM, lambda case: "ffn_projections" in case["results"])
def test_numbers_of_projections(case: Case) -> None:
    """The published code has a fourth set, two a span, that is never exported and that ours has not."""
    spans, groups = (tuple(map(written, case[name])) for name in ("layer_indexs", "ehs_same"))
    transform = Contiguous(spans=spans, text=groups)
    blocks = on_meta(transform).transformer.transformer_blocks
    results = case["results"]
    assert sum(b.is_student for b in transform.left(60)) == results["students"]
    assert len(numbers(blocks, "text_proj")) == results["text_projections"]
    assert len(numbers(blocks, "text_resume")) == results["text_resume_projections"]
    assert 2 * len(blocks) == results["ffn_projections"]


@cases(SYSTEM, lambda case: "single_stream_index" in case["results"])
def test_indices_of_the_export(case: Case) -> None:
    removed = json.loads(case["name"].split("blocks ")[1])
    further = [Kept(tuple(n for n in range(35) if n not in removed))] if removed else []
    blocks = on_meta(EXPORT, *further).transformer.transformer_blocks
    results = case["results"]
    assert numbers(blocks, "text_proj") == results["single_stream_index"]
    assert numbers(blocks, "text_resume") == results["ehs_proj_index"]
    linear = [j for j, block in enumerate(blocks) if isinstance(linear_mlps(block)["image"], torch.nn.Linear)]
    assert linear == results["ffn_proj_index"]
    assert len(blocks) == results["num_layers"]
    left = [b.first for b in EXPORT.left(60)]
    assert removed or [left[j] for j in numbers(blocks, "text_proj")] == [37, 41, 51, 52, 54, 56, 58, 59]
    assert all(projections(blocks[j]) for j in linear)


def test_spans_of_the_export_are_put_back_with_the_group_that_covers_them() -> None:
    """52-53, 54-55 and 56-57 lie inside the text's group 50-59; 25-27 lies outside of all."""
    pruned, original = on_meta(EXPORT), on_meta()
    back = tuple(s for s in SPANS if s != "52-53")
    for chosen, lost in (
        (replace(EXPORT, spans=back), "text=50-59"),
        (replace(EXPORT, spans=()), "text=50-59"),
    ):
        with pytest.raises(ConfigError, match=f"{lost} of the pruned model was trained for other blocks"):
            _check_forms(chosen, EXPORT, 60)
    kept = _with_room(EXPORT, replace(EXPORT, spans=SPANS[:-3]), 60, True, True)
    assert (kept.text, kept.linear) == (GROUPS[3:5], (2,))
    _check_forms(kept, EXPORT, 60)
    assert len(original.shaped([kept]).transformer.transformer_blocks) == 38
    outside = tuple(s for s in SPANS if s != "25-27")
    assert _with_room(EXPORT, replace(EXPORT, spans=outside), 60, True, True).text == EXPORT.text
    with pytest.raises(ConfigError, match="student of 54-55 is not in the pruned model"):
        _check_forms(_with_room(EXPORT, replace(EXPORT, spans=back), 60, True, True), EXPORT, 60)
    assert len(pruned.transformer.transformer_blocks) == 35


@cases(SYSTEM, lambda case: "block_19" in case["results"])
def test_parameters_of_the_published_models(case: Case) -> None:
    """20.43, 11.93 and 10.60 thousand millions, to the unit."""
    pruned = {"parameters, unpruned": [], "parameters, 35 blocks": [Contiguous(spans=SPANS)]}
    model = on_meta(*pruned.get(case["name"], [EXPORT]))
    blocks = model.transformer.transformer_blocks
    results = case["results"]
    assert count(model) == results["parameters"] and len(blocks) == results["blocks"]
    assert all(count(blocks[n]) == results[f"block_{n}"] for n in (19, 2, 34))
