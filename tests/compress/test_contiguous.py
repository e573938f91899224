"""Contiguous spans: the detector, least squares, students apart, the plug table, narrower blocks, and what refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditkit
from contiguous_support import Pictures, T, drawn, out, same, settings, toy_model
from ditkit.adapt.lora import LoRA
from ditkit.caching import TaylorSeer
from ditkit.compress import Calibration, Contiguous, plug, recording
from ditkit.compress.cka import NormalEquations, fit_affine, linear_cka
from ditkit.compress.contiguous import renumbered
from ditkit.compress.rescaled import Rescaled, magnitudes
from ditkit.compress.spans import Found, Probes, choose, find_spans
from ditkit.core.cond import Cond
from ditkit.core.convention import SIT
from ditkit.core.errors import CheckpointError, ConfigError
from ditkit.core.model import Model
from ditkit.models.dit import DiT, DiTConfig
from ditkit.nn.direction import squared_distance
from ditkit.train.apart import Apart
from ditkit.train.denoising import Denoising
from ditkit.train.loop import train
from ditkit.train.parts import train_only
from ditkit.train.teacher import Held
from ditkit.train.terms.regression import Regression
from ditkit.train.terms.span_distillation import SpanDistillation
from rig import noise, tiny_dit

# linear CKA, probes and the rule


def test_cka_is_hsic_blind_to_rotation_and_scale_only():
    g = drawn(1)
    x, y = torch.randn(40, 5, generator=g).double(), torch.randn(40, 7, generator=g).double()
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=g).double())[0]
    assert linear_cka(x, x) == pytest.approx(1)
    assert linear_cka(x, 3 * x @ rotation + 2) == pytest.approx(1)
    assert linear_cka(x @ rotation, 0.1 * y) == pytest.approx(linear_cka(x, y))
    assert linear_cka(x, x @ torch.randn(5, 5, generator=g).double()) < 0.99
    assert linear_cka(x, torch.ones(40, 2)) == 0

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        """Sums over all pairs of rows, of the kernels a_i . a_j and b_i . b_j with row and column means taken off."""
        centring = torch.eye(len(a), dtype=torch.float64) - 1 / len(a)
        return torch.trace(a @ a.mT @ centring @ (b @ b.mT) @ centring) / (len(a) - 1) ** 2

    assert linear_cka(x, y) == pytest.approx(
        (hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()).item(), rel=1e-12
    )


def test_least_squares_are_exact_not_transposed_and_the_same_from_sums():
    g = drawn(2)
    x, weight, bias = (
        torch.randn(60, 6, generator=g),
        torch.randn(3, 6, generator=g),
        torch.randn(3, generator=g),
    )
    y = x @ weight.mT + bias
    fitted = fit_affine(x, y)
    layer = nn.Linear(6, 3)
    layer.weight.data, layer.bias.data = fitted
    assert (layer(x) - y).square().mean() < 1e-6 and torch.allclose(layer.weight, weight, atol=1e-5)
    noisy = y + torch.randn(60, 3, generator=g)
    sums = NormalEquations(ridge=0)
    for part in (slice(0, 25), slice(25, 60)):
        sums.add(x[part], noisy[part])
    whole = fit_affine(x, noisy)
    assert torch.allclose(sums.solve().weight.float(), whole.weight, atol=1e-5)
    assert torch.allclose(sums.solve().bias.float(), whole.bias, atol=1e-5)
    pulled = NormalEquations(ridge=1.0)
    pulled.add(x, noisy)
    assert pulled.solve().weight.norm() < whole.weight.norm()
    assert torch.allclose(pulled.solve()(x.double()).mean(0).float(), noisy.mean(0), atol=1e-5)
    with pytest.raises(ConfigError, match="calibration has 6 tokens, expected more than the 6 channels"):
        fit_affine(x[:6], y[:6])


def test_least_squares_of_rows_that_do_not_span_are_the_same_each_time():
    g = drawn(8)
    x = torch.randn(300, 40, generator=g) @ torch.randn(40, 96, generator=g)
    y = torch.randn(300, 8, generator=g).mul(1e-3) + x @ torch.randn(96, 8, generator=g)
    first, again = fit_affine(x, y), fit_affine(x.clone(), y.clone())
    assert torch.equal(first.weight, again.weight) and torch.equal(first.bias, again.bias)
    assert (first(x) - y).norm() < 1e-3 * y.norm() and first.weight.norm() < 2 * y.norm() / x.norm() * 96**0.5


class Stand(nn.Module):
    """A block: affine, or a sine that no affine map is like."""

    def __init__(self, width: int, affine: bool, g: torch.Generator) -> None:
        super().__init__()
        self.affine = affine
        self.matrix = torch.linalg.qr(torch.randn(width, width, generator=g))[0]
        self.shift = torch.randn(width, generator=g)

    def forward(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        return (
            x + 0.3 * x @ self.matrix + 0.1 * self.shift
            if self.affine
            else 2 * torch.sin(3 * x @ self.matrix)
        )


def planted(affine: set[int], depth: int) -> tuple[DiT, Calibration]:
    config = DiTConfig(
        size=16, patch=4, channels=1, width=16, depth=depth, heads=2, classes=4, convention=SIT
    )
    g = drawn(3)
    model = DiT(config).eval()
    nn.init.normal_(model.head.out.weight)
    for i, block in enumerate(model.blocks):
        block.forward = Stand(16, i in affine, g).forward  # type: ignore[method-assign]
    with recording(model) as calls, torch.no_grad():
        for time in (0.2, 0.8):
            model(
                torch.randn(32, 1, 16, 16, generator=g),
                torch.full((32,), time),
                Cond(label=torch.arange(32) % 4),
            )
    return model, Calibration(tuple(calls))


def test_a_linear_teacher_is_one_span():
    depth = 6
    model, calibration = planted(set(range(depth)), depth)
    probes = Probes.fit(model, calibration, "blocks", depth)
    block = model.blocks[2]
    x = torch.randn(50, 16, generator=drawn(4))
    step = probes.maps[2]["image"]
    assert (x + step(x) - block(x)).abs().max() < 1e-4
    pairs = [(u, k) for u in range(depth) for k in range(u, depth)]
    assert all(probes.cka(u, k) == pytest.approx(1, abs=1e-5) for u, k in pairs)
    assert [found[:2] for found in find_spans(probes.cka, depth)] == [(0, depth - 1)]
    assert probes.final_cka(model, calibration, (0, depth - 1)) == pytest.approx(1, abs=1e-4)


def test_planted_spans_are_found_and_a_budget_takes_the_best_of_them():
    model, calibration = planted({4, 5, 6, 10, 11}, 13)
    probes = Probes.fit(model, calibration, "blocks", 13)
    assert [found[:2] for found in find_spans(probes.cka, 13)] == [(3, 6), (9, 11)]
    assert find_spans(probes.cka, 13, fixed={5, 11})[0][:2] == (3, 4)
    found = Contiguous(remove=5).resolved(model, calibration)
    assert found.spans == ("3-6", "9-11") and found.remove == 0
    with pytest.raises(
        ConfigError, match=r"remove=6, expected at most the 5 blocks of the spans that were found"
    ):
        Contiguous(remove=6).resolved(model, calibration)


def test_the_rule_of_first_differences_by_hand():
    table = {(0, 1): 0.99, (0, 2): 0.985, (0, 3): 0.97, (3, 4): 0.8, (4, 5): 0.95, (4, 6): 0.91, (4, 7): 0.89}
    found = find_spans(lambda u, k: table[u, k], 8)
    assert [(a, b) for a, b, _ in found] == [(0, 2), (4, 6)] and found[0].rise == pytest.approx(0.005)
    spans = [Found(0, 2, 0.005), Found(4, 6, 0.04), Found(8, 9, 0.001)]
    assert choose(spans, 1) == ((8, 9),) and choose(spans, 4) == ((0, 2), (4, 5), (8, 9))


# students


def deep() -> DiT:
    """A teacher whose blocks do something."""
    model = toy_model(SIT, depth=6)
    for n, block in enumerate(model.blocks):
        with torch.no_grad():
            block.modulation.weight.copy_(
                0.3 * torch.randn(block.modulation.weight.shape, generator=drawn(n))
            )
    return model


def losses_of(model: Model, teacher: Model, term: SpanDistillation) -> tuple[dict[str, Tensor], Tensor]:
    """The loss of each span, and their sum, on one batch."""
    own = term.modules(model)
    found: dict[str, Tensor] = {}

    class Noting(SpanDistillation):
        def of_pair(self, pair: Any, *args: Any) -> Tensor:
            found[pair.own] = super().of_pair(pair, *args)
            return found[pair.own]

    noting = Noting(sequential=term.sequential)
    data, cond = Pictures().batch(torch.arange(8))
    cond = replace(cond, drop=torch.zeros(8).bool())
    held = Held(modules={"Noting": own}, teachers={"Noting": teacher})
    g = drawn(7)
    losses = Apart((noting,)).at(
        model,
        model,
        path=model.config.convention.make_path(),
        data=data,
        noise=torch.randn(data.shape, generator=g),
        t=torch.linspace(0.1, 0.9, 8),
        cond=cond,
        held=held,
    )
    return found, losses["loss"]


SPANS = "contiguous:spans=0-1+3-5"


def test_a_student_hears_of_no_other():
    teacher = deep().eval().requires_grad_(False)
    model = ditkit.compress(deep(), SPANS).train()
    train_only(model, "contiguous")
    found, total = losses_of(model, teacher, SpanDistillation())
    assert torch.allclose(total, torch.stack([loss.mean() for loss in found.values()]).sum())
    for place, name in ((0, "blocks.0"), (2, "blocks.2")):
        model.zero_grad()
        found[name].mean().backward(retain_graph=True)
        touched = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert touched and all(key.startswith(f"blocks.{place}.") for key in touched)
    assert all(p.grad is None for p in teacher.parameters())
    spoiled = ditkit.compress(deep(), SPANS).train()
    for p in spoiled.blocks[0].parameters():
        nn.init.normal_(p)
    again, _ = losses_of(spoiled, teacher, SpanDistillation())
    assert torch.equal(again["blocks.2"], found["blocks.2"]) and not torch.equal(
        again["blocks.0"], found["blocks.0"]
    )
    clean, _ = losses_of(model, teacher, SpanDistillation(sequential=True))
    spoiled_too, _ = losses_of(spoiled, teacher, SpanDistillation(sequential=True))
    assert not torch.equal(clean["blocks.2"], spoiled_too["blocks.2"])


def test_blocks_that_stay_are_not_computed_and_the_teacher_stops_after_the_last_span():
    teacher, ran = deep().eval().requires_grad_(False), list[tuple[str, int]]()
    model = ditkit.compress(deep(), "contiguous:spans=1-2").train()
    for who, blocks in (("teacher", teacher.blocks), ("student", model.blocks)):
        for i, block in enumerate(blocks):
            block.register_forward_hook(lambda *_, who=who, i=i: ran.append((who, i)))
    losses_of(model, teacher, SpanDistillation())
    assert ran == [("teacher", 0), ("teacher", 1), ("teacher", 2), ("student", 1)]


def test_the_loss_knows_directions_only():
    g = drawn(5)
    s, t = torch.randn(2, 9, 8, generator=g).double(), torch.randn(2, 9, 8, generator=g).double()
    cosines = nn.functional.cosine_similarity(s, t, -1)
    assert torch.allclose(squared_distance(s, t), 2 - 2 * cosines, atol=1e-6)
    assert torch.allclose(squared_distance(10 * s, t), squared_distance(s, t), atol=1e-12)
    assert squared_distance(torch.zeros(1, 1, 8), t[:1, :1]).isfinite().all()


def test_padded_text_counts_unless_it_is_masked():
    g = drawn(6)
    own, taught = torch.randn(2, 4, 8, generator=g), torch.randn(2, 4, 8, generator=g)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    known = Cond(text_mask=mask)

    class Two:
        def __init__(self, x: Tensor) -> None:
            self.text = x

    class Quiet:
        def note(self, *args: Any) -> None: ...

    from types import SimpleNamespace

    from ditkit.train.terms.span_distillation import Compared

    pair = Compared("a", "b", "text")
    batch = SimpleNamespace(taps={"a": Two(own)}, own=Quiet(), cond=known)
    errors = squared_distance(own, taught)
    plain = SpanDistillation().of_pair(pair, batch, {"b": Two(taught)})
    masked = SpanDistillation(masked=True).of_pair(pair, batch, {"b": Two(taught)})
    assert torch.allclose(plain.mean(), errors.mean())
    assert torch.allclose(masked.mean(), errors[mask].mean())


def trained(tmp_path: Path, **changed: Any) -> tuple[DiT, Any]:
    model = ditkit.compress(deep(), "contiguous:spans=0-1+3-5,linear=2,samples=8,steps=3,start=first")
    given = {"learning_rate": 1e-3, "trained": "contiguous", **changed}
    done = train(
        model,
        Pictures(),
        Denoising((SpanDistillation(),)),
        settings(**given),
        tmp_path,
        start=lambda: deep().eval(),
    )
    return done, [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]


def test_training_lowers_the_loss_follows_lengths_and_leaves_the_rest_alone(tmp_path):
    done, lines = trained(tmp_path / "run", steps=15, save_every=0)
    first, last = (sum(line["loss"] for line in part) for part in (lines[:3], lines[-3:]))
    assert last < 0.9 * first
    lengths = {name: value for name, value in lines[-1].items() if name.startswith("length")}
    assert len(lengths) == 3 and all(0.5 < value < 2 for value in lengths.values())
    before = deep().state_dict()
    after = done.state_dict()
    for name, value in before.items():
        if not name.startswith("blocks."):
            assert torch.equal(after[name], value)
    back = plug(deep(), done, spans=(), linear=())
    assert same(back, deep()) and back.transforms == () and torch.equal(drawn_of(back), drawn_of(deep()))
    pruned, original = done.blocks.state_dict(), deep().blocks.state_dict()
    one, other = plug(deep(), done, spans=("0-1",), linear=()), plug(deep(), done, spans=("3-5",), linear=())
    assert (len(one.blocks), len(other.blocks)) == (5, 4)
    for name, value in one.blocks[0].state_dict().items():
        assert torch.equal(value, pruned[f"0.{name}"])
        assert torch.equal(one.blocks[3].state_dict()[name], original[f"4.{name}"])
        assert torch.equal(other.blocks[3].state_dict()[name], pruned[f"2.{name}"])
    assert same(plug(deep(), done), done)


@torch.no_grad()
def drawn_of(model: Model) -> Tensor:
    data, cond = Pictures().batch(torch.arange(2))
    return model.eval()(data, T, cond)


def test_a_run_that_was_interrupted_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    whole, _ = trained(tmp_path / "whole", steps=4)
    with monkeypatch.context() as killed:
        steps = iter([*[None] * 2, KeyboardInterrupt()])
        step = Pictures.batch

        def batch(data: Pictures, *given: Any) -> Any:
            if stop := next(steps):
                raise stop
            return step(data, *given)

        killed.setattr(Pictures, "batch", batch)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "parts", steps=4)
    model = ditkit.compress(deep(), "contiguous:spans=0-1+3-5,linear=2,samples=8,steps=3,start=first")
    again = train(
        model,
        Pictures(),
        Denoising((SpanDistillation(),)),
        settings(steps=4, learning_rate=1e-3, trained="contiguous"),
        tmp_path / "parts",
        resume=True,
        start=lambda: deep().eval(),
    )
    assert same(again, whole)


def test_no_other_term_shares_the_pass_and_it_needs_a_pruned_model():
    with pytest.raises(
        ConfigError, match="SpanDistillation runs the network in pieces, which no other term can read"
    ):
        Denoising((SpanDistillation(), Regression())).chosen()
    with pytest.raises(ConfigError, match="SpanDistillation needs a model that Contiguous pruned"):
        Denoising((SpanDistillation(),)).chosen().check(deep())


def test_a_teacher_of_another_depth_is_refused_before_the_first_step(tmp_path):
    """As when a run goes on from a model that was pruned before it."""
    pruned = ditkit.compress(deep(), "contiguous:spans=0-1")
    objective, given = Denoising((SpanDistillation(),)), settings(steps=2, trained="contiguous")
    with pytest.raises(ConfigError, match="the teacher has 5 blocks on 'blocks', the model was pruned of 6"):
        train(pruned, Pictures(), objective, given, tmp_path / "run")


# the plug table


def test_a_saved_folder_opens_the_same_and_its_students_plug_into_the_original(tmp_path):
    pruned = ditkit.compress(tiny_dit(), "contiguous:spans=0-1")
    for p in pruned.blocks[0].parameters():
        p.data += 0.01
    folder = pruned.save(tmp_path / "pruned")
    assert same(ditkit.load(folder), pruned) and torch.equal(out(ditkit.load(folder)), out(pruned))
    assert pruned.history[-1]["report"]["index"] == {"0": 0, "1": 0, "2": 1}
    assert [pruned.origin(name) for name in ("blocks.0.attn", "blocks.1.attn")] == [
        "blocks.0.attn",
        "blocks.2.attn",
    ]
    text = f"contiguous:spans=0-1,students={folder}"
    assert same(ditkit.compress(tiny_dit(), text), pruned)
    half = pruned.save(tmp_path / "half", dtype=torch.bfloat16)
    assert not same(plug(tiny_dit(), ditkit.load(half)), pruned)  # to the rounding of its students
    with pytest.raises(CheckpointError, match="was made of another model, or trained as a whole since"):
        ditkit.compress(tiny_dit(seed=1), text)
    for changed, message in {
        "spans=1-2": "one of the spans of the pruned model '1-2'",
        "spans=0-1,stack=single": "unknown stack 'single'",
        "spans=0-1,linear=2": "one of the linear of the pruned model '2'",
    }.items():
        with pytest.raises(ConfigError, match=message):
            ditkit.compress(tiny_dit(), f"contiguous:{changed},students={folder}")
    ditkit.adapt(pruned, LoRA(rank=2)).save(tmp_path / "adapted")
    with pytest.raises(ConfigError, match="finish other transforms first"):
        ditkit.compress(tiny_dit(), f"contiguous:spans=0-1,students={tmp_path / 'adapted'}")
    assert same(plug(tiny_dit(), pruned, spans=()), tiny_dit())


def test_the_neutral_setting_is_the_original_to_the_bit():
    model = tiny_dit()
    expected = out(model)
    model.transform(Contiguous())
    model.transform(Contiguous(spans=("0-1",)).exact())
    assert model.transforms == () and torch.equal(out(model), expected)


def test_tensors_made_for_the_original_move_to_the_new_numbers():
    state = {f"transformer.blocks.{n}.lora": torch.tensor(n) for n in range(6)} | {
        "blocks.5.a": torch.tensor(5)
    }
    found = renumbered({**state, "head.lora": torch.tensor(9)}, Contiguous(spans=("1-2", "3-4")), "blocks")
    assert {k: int(v) for k, v in found.items()} == {
        "transformer.blocks.0.lora": 0,
        "transformer.blocks.3.lora": 5,
        "blocks.3.a": 5,
        "head.lora": 9,
    }
    for other in ("lora_unet_transformer_blocks_3_attn.alpha", "controlnet_blocks.3.weight"):
        with pytest.raises(ConfigError, match="has a block's number in another form"):
            renumbered({other: torch.tensor(0)}, Contiguous(spans=("1-2",)), "transformer_blocks")


def test_lengths_are_set_right_by_an_option(tmp_path):
    original = tiny_dit()
    pruned = ditkit.compress(tiny_dit(), "contiguous:spans=0-1")
    folder = original.save(tmp_path / "original")
    with recording(original) as calls, torch.no_grad():
        original(noise(4), torch.full((4,), 0.5), Cond(label=torch.arange(4)))
    before = magnitudes(pruned, tiny_dit(), calls)
    ratio = before["blocks.0"]["image"]
    right = ditkit.compress(pruned, Rescaled(original=str(folder)), calibration=Calibration(tuple(calls)))
    assert right.transforms[-1] == Rescaled(blocks=(0,), image=(1 / ratio,))
    assert magnitudes(right, tiny_dit(), calls)["blocks.0"]["image"] == pytest.approx(1, rel=1e-5)
    assert torch.equal(out(ditkit.load(right.save(tmp_path / "right"))), out(right))
    assert same(ditkit.compress(pruned, Rescaled()), pruned)
    with pytest.raises(ConfigError, match=r"image=\(1.0,\), expected as many as blocks"):
        Rescaled(blocks=(0, 1), image=(1.0,))


def test_it_composes_with_a_cache_and_an_adapter(tmp_path):
    pruned = ditkit.compress(tiny_dit(), "contiguous:spans=0-1")
    adapted = ditkit.adapt(pruned, LoRA(rank=2))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    cache = [TaylorSeer(interval=3, order=1)]

    def draw(model: Model) -> Tensor:
        return ditkit.generate(model, [0, 1], seeds=(0, 1), steps=6, policies=cache).samples

    plain, own = draw(pruned), draw(adapted)
    assert own.isfinite().all() and not torch.equal(plain, own)
    loaded = ditkit.load(adapted.save(tmp_path))
    assert [type(t).__name__ for t in loaded.transforms] == ["Contiguous", "LoRA"]
    assert torch.equal(draw(loaded), own)


# the shell, and what is refused


def test_the_shell_finds_spans_and_names_them(tmp_path, capsys):
    from ditkit.cli.main import main

    folder = deep().save(tmp_path / "model")
    text = "contiguous:remove=2,floor=0,samples=8,steps=3"
    assert main(["compress", str(folder), "--transform", text, "--out", str(tmp_path / "small")]) == 0
    found = ditkit.load(tmp_path / "small")
    assert found.transforms[0].gone == 2 and len(found.blocks) == 4 and found.transforms[0].remove == 0
    assert main(["compress", str(folder), "contiguous:spans=5-6", "--out", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "spans=5-6 names block 6, expected numbers of the 6" in error
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spans=3", "spans='3', expected the first and the last block of several"),
        ("spans=3-3", "expected the first and the last block of several"),
        ("spans=0-1+1-2", "spans=0-1 and 1-2 overlap or are not in order"),
        ("spans=0-3", "names block 3, expected numbers of the 3"),
        ("linear=7", "linear=7 names block 7"),
        ("spans=0-1,linear=1", "linear=1 is no block that is left"),
        ("spans=0-1,remove=1", "expected one of the two"),
        ("remove=3", "remove=3, expected fewer than the 3 blocks"),
        ("text=0-1", "needs blocks of two streams"),
        ("stack=single,spans=0-1", "unknown stack 'single'"),
        ("mlps=4", "mlps=4, expected at most the 3 blocks that are left"),
        ("linear=0,samples=1,steps=1", "calibration has 32 tokens, expected more than the 32 channels"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(text, message):
    model = tiny_dit()
    with pytest.raises(ConfigError, match=message) as refusal:
        ditkit.compress(model, "contiguous:" + text)
    assert "\n" not in str(refusal.value) and same(model, tiny_dit())
