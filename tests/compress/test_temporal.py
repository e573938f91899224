"""TFMQ-DM on networks: what is quantised and really runs int8, the time path by itself, and ranges of each step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditkit
import hosts_support as hosts
from ditkit.adapt.lora import LoRA
from ditkit.attention import Neighbourhood
from ditkit.caching import TaylorSeer
from ditkit.compress import Calibration, Kept, TemporalMaintenance, recording
from ditkit.compress.features import cosines, mistaken, temporal_features
from ditkit.compress.ranges import search
from ditkit.compress.rounding import Rounded
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError, ConflictError, ShapeError
from ditkit.core.model import Model
from ditkit.hosts.hosted import Host
from ditkit.models.dit import DiT
from ditkit.nn.quantised import QuantisedLinear, Schedule
from ditkit.nn.time_path import find_time_path
from ditkit.ops.int8_linear import linear_reference
from ditkit.train.denoising import Denoising
from ditkit.train.loop import train
from rig import TINY, noise, tiny_dit
from scripts.toy_run import Pictures, settings, toy_model

TIMES = (1.0, 0.75, 0.5, 0.25)
LABELS = torch.arange(16) % 5
QUICK = TemporalMaintenance(weights=4, interval=1, iterations=8, rate=3e-2, batch=8)


def arguments(t: float, seed: int = 0) -> dict[str, Any]:
    return {"x": noise(16, seed), "t": torch.full((16,), t), "cond": Cond(label=LABELS)}


@torch.no_grad()
def out(model: Model, t: float = 0.75, seed: int = 9) -> Tensor:
    return model(**arguments(t, seed))


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    model = tiny_dit()
    with recording(model) as calls, torch.no_grad():
        for step, t in enumerate(TIMES):
            model(**arguments(t, step))
    return Calibration(tuple(calls))


@pytest.fixture(scope="module")
def arms(calibration) -> dict[str, Model]:
    """The same weights, quantised in several settings."""
    changed: dict[str, dict[str, Any]] = {
        "maintained": {},
        "W8A8": {"weights": 8, "rounding": "nearest"},
        "one": {"weights": 8, "rounding": "nearest", "ranges": "one"},
    }
    found, setting = {}, QUICK
    for name, fields in changed.items():
        found[name] = tiny_dit()
        found[name].transform(replace(setting, **fields), calibration)
        setting = found[name].transforms[0]
    return found


def layers_of(model: Model) -> dict[str, QuantisedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantisedLinear)}


def test_all_but_the_first_and_the_last_are_quantised_and_the_time_mlp_takes_its_rows_as_they_are(arms):
    model = arms["W8A8"]
    linear = {name for name, m in tiny_dit().named_modules() if isinstance(m, nn.Linear)}
    assert linear - set(layers_of(model)) == {"embed", "time.inner", "head.out"}
    whole = [name for name, layer in layers_of(model).items() if layer.activations == 32]
    assert whole == ["time.outer", "blocks.0.attn.qkv"]
    setting: Any = model.transforms[0]
    assert setting.times == TIMES and setting.features == tuple(
        f"{at}.modulation" for at in ("blocks.0", "blocks.1", "blocks.2", "head")
    )
    assert (out(model) - out(tiny_dit())).norm() < 0.02 * out(tiny_dit()).norm()


def test_a_trace_shows_the_product_of_int8_and_no_float_one(arms):
    model = tiny_dit()
    with torch.profiler.profile() as full, torch.no_grad():
        out(model)
    with torch.profiler.profile() as profile, torch.no_grad():
        out(arms["W8A8"])
    count = lambda found, *names: sum(e.count for e in found.key_averages() if e.key in names)  # noqa: E731
    assert (
        count(full, "aten::linear") == 5 + 3 * 4 + 3 * 4
    )  # a block's modulation is projected where it is asked for
    assert count(profile, "aten::linear") == 3 + 2  # what stays, and the two whose rows are floats
    int8 = "quantized::linear_with_input_q_dq_qweight_dq_output_fp32", "aten::_int_mm"
    assert count(profile, *int8) >= len(layers_of(arms["W8A8"])) - 2


def test_the_layer_is_the_slow_twin_and_a_modulation_is_projected_once(arms):
    layer = layers_of(arms["W8A8"])["blocks.1.mlp.inner"]
    x = torch.randn(16, 5, 32)
    layer.schedule.steps = torch.tensor([2])
    scale, zero = layer.ranges()[2]
    expected = linear_reference(
        x.double(), scale, zero, 8, layer.whole(), layer.weight_scale, layer.weight_zero, layer.bias.double()
    )
    assert torch.allclose(layer(x).double(), expected, atol=1e-5)
    called = []
    hook = layers_of(arms["W8A8"])["blocks.1.modulation"].register_forward_hook(lambda *_: called.append(1))
    out(arms["W8A8"])
    hook.remove()
    assert called == [1]


def test_packed_weights_stand_for_the_rounded_ones_to_the_bit():
    for bits in (4, 8):
        linear = nn.Linear(33, 7)
        rounded = Rounded(linear, bits)
        layer = QuantisedLinear.like(linear, bits=bits, activations=32)
        layer.hold(rounded.whole("nearest"), *rounded.range, linear.bias)
        assert torch.equal(layer.full(), rounded.weights("nearest"))
        assert layer.weight.nbytes == (7 * 33 if bits == 8 else 7 * 17)


def test_sixteen_bits_are_as_good_as_none():
    """Weights and rows of 16 bits by the slow twin, as no product has them: the whole network to 1e-3."""
    model = tiny_dit()
    expected = out(model)

    def rounded(layer: nn.Linear, args: tuple[Tensor, ...], _: Tensor) -> Tensor:
        ranges = [
            search(v.detach().reshape(n, -1), 16)
            for v, n in ((layer.weight, layer.out_features), (args[0], 1))
        ]
        (weight_scale, weight_zero), (scale, zero) = ranges
        q = ((layer.weight / weight_scale[:, None]).round() + weight_zero[:, None]).clamp(0, 2**16 - 1)
        return linear_reference(args[0], scale, zero, 16, q, weight_scale, weight_zero, layer.bias)

    for m in model.modules():
        if isinstance(m, nn.Linear):
            m.register_forward_hook(rounded)
    assert (out(model) - expected).abs().max() < 1e-3 * expected.abs().max()


def test_features_depend_on_time_and_class_alone(arms):
    names = arms["W8A8"].transforms[0].features
    calls = [arguments(0.5, 1), arguments(0.5, 2)]
    calls.append({"x": noise(2)[:, :, :4], "t": torch.full((2,), 0.5), "cond": Cond(label=LABELS[:2])})
    found = temporal_features(tiny_dit(), names, calls)
    for value in found.values():
        assert torch.equal(value[:16], value[16:32])
        assert torch.allclose(value[32:], value[:2], atol=1e-6)


@pytest.mark.parametrize(
    ("family", "depth", "shared", "features", "reads"),
    [
        ("dit", 2, 4, 3, ("timestep", "class_labels")),
        ("pixart", 1, 1, 2, ("timestep",)),  # the last layer reads the time MLP itself, beside the modulation
        ("sd3.5", 2, 2, 5, ("timestep", "pooled_projections")),
        ("wan", 1, 1, 2, ("timestep",)),
    ],
)
def test_the_time_path_of_diffusers(family, depth, shared, features, reads):
    model, inputs = hosts.FAMILIES[family].transformer(num_layers=depth), hosts.FAMILIES[family].inputs()
    path = find_time_path(model, inputs, 2)
    assert (len(path.shared), len(path.features), path.reads) == (shared, features, reads)
    inside = ("attn", "ff", "ffn", "caption", "text_embedder", "context_embedder")
    assert not any(part in name.split(".") for name in path.layers for part in inside)
    assert not set(path.layers) & set(path.data)


def test_what_a_step_gives_the_time_path_is_inside_its_range_and_no_range_for_all_is_narrower(arms):
    """Rows of g_i at a step are finitely many: the error is half a step of rounding at most."""
    for name in arms["W8A8"].transforms[0].features:
        each, one = (layers_of(arms[kind])[name] for kind in ("W8A8", "one"))
        rows: list[Tensor] = []
        hook = each.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0]))
        for t in TIMES:
            out(arms["W8A8"], t)
        hook.remove()
        for step, x in enumerate(rows):
            scale, zero = each.ranges()[step]
            back = torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)
            assert (back - x).abs().max() <= scale * 0.5001
            assert scale <= one.ranges()[0][0] * 1.0001


def test_a_learned_time_path_is_left_alone_by_the_blocks(calibration, monkeypatch):
    held: dict[str, Tensor] = {}
    from ditkit.compress.quantised import Fitting

    blocks = Fitting.reconstruct

    def noting(fitting: Fitting) -> None:
        held.update({name: layer.alpha.clone() for name, layer in fitting.time_path.items()})
        blocks(fitting)
        for name, layer in fitting.time_path.items():
            assert torch.equal(layer.alpha, held[name]) and layer.mode == "hard"
            layer.alpha.grad = None
        assert all(layer.mode == "hard" for layer in fitting.rounded.values())

    monkeypatch.setattr(Fitting, "reconstruct", noting)
    one = Calibration(calibration.calls[:1])
    tiny_dit().transform(replace(QUICK, iterations=2, activations=32), one)
    assert len(held) == 5


def test_without_maintenance_the_blocks_learn_the_time_path_too(calibration):
    shallow = DiT(replace(TINY, depth=1)).eval()
    shallow.load_state_dict({k: v for k, v in tiny_dit().state_dict().items() if k in shallow.state_dict()})
    linear = {name: m for name, m in shallow.named_modules() if name.endswith(("modulation", "time.outer"))}
    nearest = {name: Rounded(m, 4).weights("nearest") for name, m in linear.items()}
    setting = replace(QUICK, time="blocks", iterations=10, rate=0.3, activations=32)
    shallow.transform(setting, Calibration(calibration.calls[:1]))
    assert all(not torch.equal(layers_of(shallow)[name].full(), v) for name, v in nearest.items())
    assert "time_path_iterations" not in shallow.history[-1]["report"]


def test_rows_of_several_steps_have_each_its_own_ranges(arms):
    model = arms["W8A8"]
    apart = [out(model, t)[i] for i, t in enumerate((0.25, 1.0, 0.5))]
    given = arguments(1.0, 9)
    mixed = {k: v[:3] for k, v in given.items() if isinstance(v, Tensor)} | {"cond": Cond(label=LABELS[:3])}
    mixed["t"] = torch.tensor([0.25, 1.0, 0.5])
    with torch.no_grad():
        together = model(**mixed)
    assert torch.allclose(together, torch.stack(apart), atol=1e-5)


def test_other_times_have_the_nearest_ranges():
    schedule = Schedule((980.0, 500.0, 20.0))
    assert schedule.nearest(torch.tensor([999.0, 741.0, 739.0, 0.0])).tolist() == [0, 0, 1, 2]
    assert schedule.nearest(torch.tensor(510)).tolist() == [1]
    schedule.steps = torch.tensor([1, 2])
    assert schedule.of_rows(4).tolist() == [1, 1, 2, 2]
    with pytest.raises(ShapeError, match="has 3 rows, expected a multiple of 2"):
        schedule.of_rows(3)


def test_a_saved_folder_opens_the_same_and_bf16_leaves_scales_alone(arms, tmp_path):
    for name in ("maintained", "one"):
        loaded = ditkit.load(arms[name].save(tmp_path / name))
        assert torch.equal(out(loaded), out(arms[name]))
    half = arms["W8A8"].with_weights(arms["W8A8"].state_dict(), "copy").to(torch.bfloat16)
    layer = layers_of(half)["blocks.0.mlp.inner"]
    assert layer.weight_scale.dtype == layer.range_scale.dtype == torch.float32
    assert half.embed.weight.dtype == torch.bfloat16
    with torch.no_grad():
        x, given = noise(16, 9).bfloat16(), arguments(0.75)
        assert torch.allclose(
            half(x, given["t"], given["cond"]).float(), out(arms["W8A8"]), atol=0.1, rtol=0.1
        )


def test_measures_of_features():
    full = {"g": torch.eye(3)}
    own = {"g": torch.tensor([[1.0, 0.1, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 2.0]])}
    assert mistaken(own, full).tolist() == [[False, True, False]]
    assert cosines(full, full).tolist() == [[1.0, 1.0, 1.0]]


def test_it_composes_with_caches_patterns_and_pruning(calibration, tmp_path):
    model = tiny_dit()
    names = tuple(n for n, m in model.named_modules() if type(m) is nn.Linear and n.startswith("blocks.0"))
    names += tuple(name.replace("blocks.0", "blocks.1") for name in names)
    for transform in (Kept(blocks=(0, 2)), replace(QUICK, rounding="nearest", weights=8, layers=names)):
        model.transform(transform, calibration)
    policies = [TaylorSeer(interval=3, order=1), Neighbourhood(radius=2, block=8, kernel="cpu")]
    drawn = ditkit.generate(model, [0, 1], seeds=(0, 1), steps=6, policies=policies).samples
    loaded = ditkit.load(model.save(tmp_path))
    assert [type(t).__name__ for t in loaded.transforms] == ["Kept", "TemporalMaintenance"]
    assert torch.equal(
        ditkit.generate(loaded, [0, 1], seeds=(0, 1), steps=6, policies=policies).samples, drawn
    )
    assert drawn.isfinite().all()


def test_a_model_that_samples_draws_its_own_calibration_and_the_shell_says_the_same(tmp_path):
    from ditkit.cli.main import main

    folder = tiny_dit().save(tmp_path / "model")
    text = "temporalmaintenance:rounding=nearest,samples=16,steps=4,interval=2"
    assert main(["compress", str(folder), "--transform", text, "--out", str(tmp_path / "small")]) == 0
    shell = ditkit.load(tmp_path / "small")
    python = ditkit.compress(tiny_dit(), text)
    assert len(python.transforms[0].times) == 2 and torch.equal(out(shell), out(python))


@torch.no_grad()
def test_a_pipelines_transformer_is_quantised_in_place(tmp_path):
    family = hosts.FAMILIES["pixart"]
    transformer, inputs = family.transformer(num_layers=1), family.inputs()
    wide = {
        k: v.repeat(8, *[1] * (v.ndim - 1)) if isinstance(v, Tensor) and v.ndim else v
        for k, v in inputs.items()
    }
    wide["timestep"] = torch.full((16,), 500)
    expected = transformer(**wide, return_dict=False)[0]
    with recording(transformer) as calls:
        for t in (900, 500):
            transformer(**{**wide, "timestep": torch.full((16,), t)})
    setting = TemporalMaintenance(iterations=3, batch=8, interval=1)
    ditkit.compress(transformer, setting, calibration=Calibration(tuple(calls)))
    found = transformer(**wide, return_dict=False)[0]
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()
    with pytest.raises(ConfigError, match="no form that plain diffusers opens"):
        transformer.save_pretrained(tmp_path / "no")
    loaded: Any = ditkit.load(Host.around(transformer).save(tmp_path / "host"))
    assert torch.equal(loaded(**wide, return_dict=False)[0], found)


def test_adapters_are_trained_on_top_and_quantised_weights_are_not(calibration, tmp_path):
    model = toy_model()
    base = replace(QUICK, rounding="nearest", ranges="rows", weights=8)
    plain = tuple(n for n, m in model.named_modules() if type(m) is nn.Linear and n.startswith("blocks."))
    quantised = ditkit.compress(model, replace(base, layers=plain))
    for trained in ("all", "attention"):
        with pytest.raises(
            ConfigError, match=r"'blocks.0.attn.qkv' and \d+ other layers are whole numbers"
        ) as caught:
            train(quantised, Pictures(), Denoising(), settings(trained=trained), tmp_path / trained)
        assert "\n" not in str(caught.value) and not (tmp_path / trained / "model").exists()
    adapted = ditkit.compress(model, LoRA(rank=2))
    names = tuple(n for n, m in adapted.named_modules() if type(m) is nn.Linear and n.endswith("base_layer"))
    adapted.transform(replace(base, layers=names))
    before = {k: v.clone() for k, v in adapted.state_dict().items()}
    tuned = train(
        adapted, Pictures(), Denoising(), settings(steps=2, warmup=0, trained="lora"), tmp_path / "run"
    )
    after = tuned.state_dict()
    changed = {k for k, v in before.items() if not torch.equal(v, after[k])}
    assert changed and all("lora_" in name for name in changed)
    loaded = ditkit.load(tmp_path / "run" / "model")
    assert all(torch.equal(v, after[k]) for k, v in loaded.state_dict().items())


def test_the_gradient_is_that_of_the_weights_that_are_stood_for():
    linear = nn.Linear(9, 5)
    rounded = Rounded(linear, 8)
    layer = QuantisedLinear.like(linear)
    layer.hold(rounded.whole("nearest"), *rounded.range, linear.bias)
    x = torch.randn(4, 9, requires_grad=True)
    y = torch.randn(4, 5)
    (layer(x) * y).sum().backward()
    assert torch.allclose(x.grad, y @ layer.full())


def calls(count: int, **changed: Any) -> Calibration:
    some = {
        k: v[:count] if isinstance(v, Tensor) else Cond(label=LABELS[:count])
        for k, v in arguments(0.5).items()
    }
    return Calibration(({**some, **changed},))


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        (lambda m: m.transform(QUICK), ConfigError, "it is fitted to calibration, and got none"),
        (lambda m: m.transform(QUICK, [1]), ConfigError, "expected a Calibration of recorded calls"),
        (lambda m: m.transform(QUICK, Calibration()), ConfigError, "got calibration of no calls"),
        (lambda m: m.transform(QUICK, calls(4)), ConfigError, "4 samples at t=0.5, expected at least 16"),
        (
            lambda m: m.transform(QUICK, calls(16, x=torch.zeros(16, 3, 4, 4))),
            ShapeError,
            r"samples of \(3, 4, 4\), expected \(3, 8, 8\)",
        ),
        (
            lambda m: m.transform(QUICK, calls(16, t=torch.linspace(0, 1, 16))),
            ConfigError,
            "a call at times 0 to 1, expected one time a call",
        ),
        (lambda m: TemporalMaintenance(weights=5), ConfigError, "weights"),  # type: ignore[arg-type]
        (lambda m: TemporalMaintenance(weights=32), ConfigError, "expected weights of 4 or 8 bits"),
        (lambda m: m.transform(replace(QUICK, layers=("blocks.7.mlp.inner",))), ConfigError, "is no layer"),
    ],
)
def test_what_does_not_fit_is_one_line_and_changes_nothing(act, kind, message):
    model = tiny_dit()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(kind, match=message) as caught:
        act(model)
    assert "\n" not in str(caught.value) and model.transforms == ()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_int8_where_no_product_has_it_and_a_second_time_are_refused(arms, monkeypatch, calibration):
    with pytest.raises(ConflictError, match="is of whole numbers already"):
        arms["W8A8"].transform(QUICK, calibration)
    from ditkit.ops.int8_linear import kernels

    monkeypatch.setattr(kernels.Torch, "serves", lambda *_: False)
    monkeypatch.setattr(kernels.Torchao, "serves", lambda *_: False)
    monkeypatch.setattr(kernels.Fbgemm, "serves", lambda *_: False)
    kernels.fastest.cache_clear()
    with pytest.raises(ConfigError, match="no library here has a product of int8 on 'cpu'"):
        tiny_dit().transform(QUICK, calibration)
    kernels.fastest.cache_clear()
