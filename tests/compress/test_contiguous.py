"""Contiguous spans: the detector, least squares, students apart, the plug table, narrower blocks, and what refuses."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import hosts_support as hosts
from rig import noise, tiny_dit

sys.path.insert(0, str(Path(__file__).parents[1] / "support" / "scripts"))

from toy_run import Pictures, settings, toy_model

import ditkit
from ditkit.adapt.lora import LoRA
from ditkit.caching import TaylorSeer
from ditkit.compress import Calibration, Contiguous, Kept, plug, recording
from ditkit.compress.cka import NormalEquations, fit_affine, linear_cka
from ditkit.compress.contiguous import renumbered
from ditkit.compress.rescaled import Rescaled, magnitudes
from ditkit.compress.spans import Found, Probes, choose, find_spans
from ditkit.core.cond import Cond
from ditkit.core.convention import SIT
from ditkit.core.errors import CheckpointError, ConfigError, ShapeError
from ditkit.core.model import Model
from ditkit.core.run import Run
from ditkit.hosts.hosted import Host
from ditkit.models.dit import DiT, DiTConfig
from ditkit.models.small_flux import SmallFlux, SmallFluxConfig
from ditkit.nn.direction import squared_distance
from ditkit.train.denoising import Denoising
from ditkit.train.loop import train
from ditkit.train.teacher import Held
from ditkit.train.terms.regression import Regression
from ditkit.train.terms.span_distillation import SpanDistillation

COND = Cond(label=torch.tensor([0, 2]))
T = torch.tensor([0.3, 0.8])
TWO_STREAMS = ("flux", "sd3.5", "qwen-image")


@torch.no_grad()
def out(model: Model) -> Tensor:
    return model.eval()(noise(), T, COND)


def same(one: Model, other: Model) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(v, states[1][k]) for k, v in states[0].items()
    )


def drawn(count: int, seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(100 * seed + count)


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
    return toy_model(SIT, depth=6)


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
    held = Held(modules={"Noting": own}, teachers={"Noting": teacher})
    g = drawn(7)
    losses = Denoising((noting,)).at(
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
    found, total = losses_of(model, teacher, SpanDistillation())
    assert torch.allclose(total, torch.stack([loss.mean() for loss in found.values()]).sum())
    for place, name in ((0, "blocks.0"), (2, "blocks.2")):
        model.zero_grad()
        found[name].mean().backward(retain_graph=True)
        touched = {
            key.split(".")[1] for key, p in model.named_parameters() if p.grad is not None and p.grad.any()
        }
        assert touched == {str(place)}
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


def test_padded_text_counts_unless_it_is_masked(monkeypatch):
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
    given = {"steps": 12, "trained": "contiguous", **changed}
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
    done, lines = trained(tmp_path / "run", steps=25)
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
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
    whole, _ = trained(tmp_path / "whole", steps=8)
    with monkeypatch.context() as killed:
        steps = iter([*[None] * 4, KeyboardInterrupt()])
        step = Pictures.batch

        def batch(data: Pictures, *given: Any) -> Any:
            if stop := next(steps):
                raise stop
            return step(data, *given)

        killed.setattr(Pictures, "batch", batch)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "parts", steps=8)
    model = ditkit.compress(deep(), "contiguous:spans=0-1+3-5,linear=2,samples=8,steps=3,start=first")
    again = train(
        model,
        Pictures(),
        Denoising((SpanDistillation(),)),
        settings(steps=8, trained="contiguous"),
        tmp_path / "parts",
        resume=True,
        start=lambda: deep().eval(),
    )
    assert same(again, whole)


def test_no_other_term_shares_the_pass_and_it_needs_a_pruned_model(tmp_path):
    pruned = ditkit.compress(deep(), SPANS)
    with pytest.raises(
        ConfigError, match="SpanDistillation runs the network in pieces, which no other term can read"
    ):
        Denoising((SpanDistillation(), Regression())).check(pruned)
    with pytest.raises(ConfigError, match="SpanDistillation needs a model that Contiguous pruned"):
        Denoising((SpanDistillation(),)).check(deep())


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


def test_lengths_are_set_right_by_an_option(tmp_path):
    original = tiny_dit()
    pruned = ditkit.compress(tiny_dit(), "contiguous:spans=0-1")
    folder = original.save(tmp_path / "original")
    with recording(original) as calls:
        out(original)
    before = magnitudes(pruned, tiny_dit(), calls)
    ratio = before["blocks.0"]["image"]
    right = ditkit.compress(pruned, Rescaled(original=str(folder)), calibration=Calibration(tuple(calls)))
    assert right.transforms[-1] == Rescaled(blocks=(0,), image=(1 / ratio,))
    assert magnitudes(right, tiny_dit(), calls)["blocks.0"]["image"] == pytest.approx(1, rel=1e-5)
    assert torch.equal(out(ditkit.load(right.save(tmp_path / "right"))), out(right))
    assert same(ditkit.compress(pruned, Rescaled()), pruned)
    with pytest.raises(ConfigError, match=r"image=\(1.0,\), expected as many as blocks"):
        Rescaled(blocks=(0, 1), image=(1.0,))


# narrower blocks


def on_host(name: str, *transforms: Any, calls: int = 14, depth: int = 4) -> tuple[Any, dict[str, Any]]:
    """A transformer under transforms that are fitted to calls of its own, and the inputs of one."""
    family = hosts.FAMILIES[name]
    transformer, inputs = family.transformer(num_layers=depth), family.inputs()
    with recording(transformer) as found, torch.no_grad():
        for i in range(calls):
            g = drawn(i)
            given = {k: torch.randn(v.shape, generator=g) for k, v in inputs.items() if k in RANDOM}
            time = torch.full_like(inputs["timestep"], family.time * (i + 1) / calls)
            transformer(**{**inputs, **given, "timestep": time})
    ditkit.compress(transformer, *transforms, calibration=Calibration(tuple(found)))
    return transformer, inputs


RANDOM = ("hidden_states", "encoder_hidden_states")


def told_text(z: Tensor, fn: Any, *args: Any) -> Tensor:
    return z


@pytest.mark.parametrize("name", TWO_STREAMS)
def test_a_text_that_is_read_is_projected_and_goes_on_at_the_end(name):
    """Against the slow way: the whole network, whose attentions are handed P z + z, and whose text is replaced."""
    narrow, inputs = on_host(name, Contiguous(text=("0-2",)), depth=4)
    whole = hosts.FAMILIES[name].transformer(num_layers=4)
    blocks = narrow.transformer_blocks
    model = Host.around(whole)
    kept: dict[str, Any] = {}

    def keep(key: str, fn: Any, *args: Any) -> Any:
        kept[key] = fn(*args)
        return kept[key]

    def projected(i: int, fn: Any, *args: Any) -> Tensor:
        return kept["z"] + blocks[i].text_proj(kept["z"])

    def resumed(fn: Any, *args: Any) -> Any:
        state = kept["h"].text
        return fn(*args)._replace(text=state + blocks[2].text_resume(state))

    handlers = {
        "blocks.0.attn.text": partial(keep, "z"),
        "blocks.0": partial(keep, "h"),
        "blocks.1.attn.text": partial(projected, 1),
        "blocks.2.attn.text": partial(projected, 2),
        "blocks.2": resumed,
    }
    assert torch.equal(hosts.call(narrow, inputs), hosts.call(model.transformer, inputs, Run(handlers)))
    assert [block.text_role for block in blocks] == ["handed", "read", "resumed", "own"]
    assert not any(
        n.startswith(("txt", "norm1_context", "ff_context")) for n, _ in blocks[1].named_parameters()
    )
    assert hosts.same_in_both(narrow, inputs, hosts.call(narrow, inputs))


@pytest.mark.parametrize("name", [*TWO_STREAMS, "tiny"])
def test_an_mlp_becomes_a_layer_on_the_state_after_the_attention(name):
    """Against the slow way: the whole network, whose block gives h + F h."""
    kept: dict[str, Any] = {}

    def before(stream: str, fn: Any, x: Tensor, *args: Any) -> Tensor:
        kept[stream] = x
        return fn(x, *args)

    if name == "tiny":
        model = tiny_dit()
        given = [
            {"x": noise(4, seed), "t": torch.full((4,), seed / 9), "cond": Cond(label=torch.arange(4))}
            for seed in range(9)
        ]
        narrow = ditkit.compress(model, Contiguous(linear=(1,)), calibration=Calibration(tuple(given)))
        layer = narrow.blocks[1].linear

        def replaced(fn: Any, *args: Any) -> Tensor:
            fn(*args)
            return kept["image"] + layer(kept["image"])

        run = Run({"blocks.1": replaced, "blocks.1.mlp": partial(before, "image")})
        with torch.no_grad():
            assert torch.equal(out(narrow), model(noise(), T, COND, run=run))
        return
    transformer, inputs = on_host(name, Contiguous(linear=(1,)), depth=3)
    whole = hosts.FAMILIES[name].transformer(num_layers=3)
    image, text = (
        transformer.transformer_blocks[1].get_submodule(part)
        for part in (("img_mlp", "txt_mlp") if name == "qwen-image" else ("ff", "ff_context"))
    )

    def replaced_pair(fn: Any, *args: Any) -> Any:
        return fn(*args)._replace(
            image=kept["image"] + image(kept["image"]), text=kept["text"] + text(kept["text"])
        )

    run = Run(
        {
            "blocks.1": replaced_pair,
            "blocks.1.mlp": partial(before, "image"),
            "blocks.1.text.mlp": partial(before, "text"),
        }
    )
    expected = hosts.call(Host.around(whole).transformer, inputs, run)
    assert torch.allclose(hosts.call(transformer, inputs), expected, atol=1e-6)


def small_flux() -> SmallFlux:
    config = SmallFluxConfig(
        size=8, channels=1, width=32, heads=4, depth=4, single_depth=3, classes=4, letters=8
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = SmallFlux(config).eval()
        for p in model.parameters():
            if not p.any():
                nn.init.normal_(p, std=0.05)
    return model


NARROW = ("contiguous:text=0-3,spans=1-2,linear=0,samples=8,steps=3", "contiguous:stack=single,spans=0-1")


def test_depth_and_width_are_trained_in_one_phase_and_plugged_back(tmp_path):
    pruned = ditkit.compress(small_flux(), *NARROW)
    objective = Denoising((SpanDistillation(),))
    done = train(
        pruned,
        Pictures(),
        objective,
        settings(steps=10, trained="contiguous", gradient_checkpointing=True),
        tmp_path / "run",
        start=small_flux,
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "losses.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    changed = {
        ".".join(name.split(".")[1:3])
        for name, value in ditkit.compress(small_flux(), *NARROW).state_dict().items()
        if not torch.equal(value, done.state_dict()[name])
    }
    assert changed == {f"transformer_blocks.{n}" for n in (0, 1, 2)} | {"single_transformer_blocks.0"}
    loaded = ditkit.load(tmp_path / "run" / "model")
    assert same(loaded, done) and loaded.transforms == done.transforms
    policies = [TaylorSeer(interval=3, order=1)]
    exact, cached = (
        ditkit.generate(loaded, [0, 1], seeds=(0, 1), steps=6, policies=p).samples for p in ((), policies)
    )
    assert exact.isfinite().all() and 0 < (exact - cached).norm() < exact.norm()
    single = plug(small_flux(), done, stack="single")
    assert (
        len(single.transformer.single_transformer_blocks) == 2
        and len(single.transformer.transformer_blocks) == 4
    )
    assert same(plug(small_flux(), done, (), (), (), "single"), small_flux())
    with pytest.raises(ConfigError, match="is not in the pruned model, where it is narrower"):
        plug(small_flux(), done, text=())


def test_it_composes_with_a_cache_and_an_adapter(tmp_path):
    pruned = ditkit.compress(tiny_dit(), "contiguous:spans=0-1")
    adapted = ditkit.adapt(pruned, LoRA(rank=2))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    draw = partial(ditkit.generate, labels=[0, 1], seeds=(0, 1), steps=6)
    plain, own = (draw(m, policies=[TaylorSeer(interval=3, order=1)]).samples for m in (pruned, adapted))
    assert own.isfinite().all() and not torch.equal(plain, own)
    loaded = ditkit.load(adapted.save(tmp_path))
    assert [type(t).__name__ for t in loaded.transforms] == ["Contiguous", "LoRA"]
    assert torch.equal(draw(loaded, policies=[TaylorSeer(interval=3, order=1)]).samples, own)


# folders of diffusers, the shell, pipelines


@pytest.mark.parametrize("name", TWO_STREAMS)
def test_without_spans_a_transformer_is_an_ordinary_folder_and_both_numberings_open(name, tmp_path):
    from safetensors.torch import load_file, save_file

    transformer, inputs = on_host(name, Contiguous(spans=("0-2",)), depth=5, calls=0)
    expected = hosts.call(transformer, inputs)
    transformer.save_pretrained(tmp_path / "new")
    plain = getattr(diffusers, type(transformer).__name__).from_pretrained(tmp_path / "new")
    assert len(plain.transformer_blocks) == 3 and torch.equal(hosts.call(plain, inputs), expected)
    file = next((tmp_path / "new").glob("*.safetensors"))
    old = {"0": "0", "1": "3", "2": "4"}

    def with_gaps(key: str) -> str:
        stack, _, rest = key.partition(".")
        number, _, inner = rest.partition(".")
        return f"{stack}.{old[number]}.{inner}" if stack == "transformer_blocks" else key

    save_file({with_gaps(k): v for k, v in load_file(file).items()}, file)
    assert torch.equal(hosts.call(ditkit.load(tmp_path / "new").transformer, inputs), expected)


def test_a_narrower_transformer_is_a_folder_of_ours(tmp_path):
    transformer, inputs = on_host("flux", Contiguous(text=("0-2",), linear=(1,)), depth=4)
    expected = hosts.call(transformer, inputs)
    with pytest.raises(ConfigError, match="Contiguous has no form that plain diffusers opens"):
        transformer.save_pretrained(tmp_path)
    Host.around(transformer).save(tmp_path / "ours")
    assert torch.equal(hosts.call(ditkit.load(tmp_path / "ours").transformer, inputs), expected)


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
        ("linear=0,samples=1,steps=1", "calibration has 16 tokens, expected more than the 32 channels"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(text, message):
    model = tiny_dit()
    with pytest.raises(ConfigError, match=message) as refusal:
        ditkit.compress(model, "contiguous:" + text)
    assert "\n" not in str(refusal.value) and same(model, tiny_dit())


def test_groups_of_text_lie_beside_spans_and_calibration_is_asked_for():
    model = hosts.FAMILIES["flux"].transformer(num_layers=6)
    for text in ("0-2", "1-4"):
        with pytest.raises(ConfigError, match=f"text={text} begins or ends inside the span 1-3"):
            Contiguous(spans=("1-3",), text=(text,)).check(Host.around(model))
    with pytest.raises(ConfigError, match="spans and projections are fitted from calibration, and got none"):
        ditkit.compress(model, Contiguous(text=("0-2",)))
    calls = ({"hidden_states": torch.zeros(1, 3, 4, 4), "timestep": torch.zeros(1)},) * 2
    other = ({**calls[0], "hidden_states": torch.zeros(1, 3, 2, 2)},)
    with pytest.raises(ShapeError, match="calibration has samples of"):
        ditkit.compress(model, Contiguous(text=("0-2",)), calibration=Calibration((*calls, *other)))
    sd3 = Host.around(hosts.FAMILIES["sd3.5"].transformer(num_layers=4))
    with pytest.raises(ConfigError, match="takes in block 3 of 'blocks', which other parts"):
        Contiguous(text=("1-3",)).check(sd3)
    narrow, _ = on_host("flux", Contiguous(text=("0-2",)), depth=4)
    with pytest.raises(ConfigError, match="leave out block 2, which hands a text on or reads one"):
        ditkit.compress(narrow, Kept(blocks=(0, 1, 3)))
