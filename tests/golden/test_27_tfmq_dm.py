"""TFMQ-DM's ranges, rounding, running ranges and reconstruction of the time path against ModelTC/TFMQ-DM."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import formula
from ditkit.compress.ranges import Running, search, span
from ditkit.compress.reconstruction import features, learn_features
from ditkit.compress.rounding import Rounded, Rounding, soft, squared
from ditkit.nn.time_path import TimePath, find_time_path
from ditkit.ops.int8_linear import dequantise, quantise
from golden_support import FOLDER, assert_golden, float64, with_time

SYSTEM = "27-tfmq-dm"
ROUNDED = "weights per channel, 4 bits, and AdaRound"
FEATURES = "temporal features in full precision and with 4-bit nearest weights"
TIAR = "TIAR, 40 iterations on 4 times"
WITH_TIME = with_time(1e-6)
FILE = json.loads((FOLDER / f"{SYSTEM}.json").read_text())
UNET = "which layers are quantised, time path, exceptions"


CASES = {case["name"]: case for case in FILE["cases"]}


def given(name: str, shape: list[int]) -> Tensor:
    weight = formula.weight(name, tuple(shape))
    return weight * (torch.arange(shape[0]) + 1).view(-1, *[1] * (len(shape) - 1))


def linear(weight: Tensor, bits: int = 4) -> Rounded:
    with float64():
        layer = nn.Linear(weight[0].numel(), len(weight))
    with torch.no_grad():
        layer.weight.copy_(weight.flatten(1))
        layer.bias.zero_()
    return Rounded(layer, bits)


@pytest.mark.parametrize("name", CASES["range search per tensor"]["results"])
def test_ranges(name):
    expected = CASES["range search per tensor"]["results"][name]
    x = formula.tensor("x1", (8, 12)) * (torch.arange(8) + 1)[:, None] + 0.3
    rule, bits, kind = name.replace(" bits", "").split(", ")
    if kind.startswith("always_zero"):
        x = formula.tensor("x1", (8, 12)).abs()
    positive, symmetric = kind.startswith("always_zero"), kind == "symmetric"
    row = x.reshape(1, -1)
    if rule == "mse":
        found = search(row, int(bits), positive=positive)
    else:
        found = span(row, int(bits), symmetric=symmetric, positive=positive)
    assert found.scale.item() == pytest.approx(expected["delta"], rel=1e-9)
    assert found.zero.item() == expected["zero_point"]


@pytest.mark.parametrize(("name", "shape"), [("w1", [6, 20]), ("w2", [5, 3, 3, 3])])
def test_rounding(name, shape):
    (expected,) = (
        case["results"] for case in FILE["cases"] if case["name"] == ROUNDED and name in case["inputs"]
    )
    layer = linear(given(name, shape))
    assert layer.range.scale.tolist() == pytest.approx(expected["delta"], rel=1e-9)
    assert layer.range.zero.tolist() == expected["zero_point"]
    for mode, key in (("nearest", "nearest"), ("soft", "soft_at_start"), ("hard", "hard_at_start")):
        assert_golden(layer.weights(mode).view(shape), expected[key])
    assert_golden(layer.alpha.view(shape), expected["alpha_at_start"])
    apart = (layer.weights("soft") - layer.linear.weight).abs().max().item()
    assert apart == pytest.approx(expected["soft_at_start_max_difference_to_w"], rel=1e-9)
    with torch.no_grad():
        layer.alpha += 2.5 * formula.tensor(f"{name}.shift", tuple(shape)).flatten(1)
    assert_golden(soft(layer.alpha).view(shape), expected["shifted"]["h"])
    for mode in ("soft", "hard"):
        assert_golden(layer.weights(mode).view(shape), expected["shifted"][mode])


def test_loss_of_reconstruction():
    case = CASES["reconstruction loss with the rounding regulariser over the iterations"]["results"]
    layer = linear(formula.weight("lw1", (5, 6)))
    settings = Rounding(iterations=100)
    plain = squared(formula.tensor("lw1.pred", (3, 5)), formula.tensor("lw1.target", (3, 5)))
    assert plain.item() == pytest.approx(case["reconstruction_part"], rel=1e-9)
    for call, expected in case["by_call"].items():
        count = int(call.split()[1])
        assert (plain + settings.undecided([layer], count)).item() == pytest.approx(
            expected["total"], rel=1e-9
        )
        assert settings.beta(count) == pytest.approx(expected["beta"], rel=1e-12)


def test_running_range():
    case = CASES["activation range of one step, 8 bits: search, then running min and max (momentum 0.95)"]
    batches = [formula.tensor(f"run1.{i}", (4, 10)) * (1 + i) + 0.2 * i for i in range(4)]
    running = Running(8)
    for batch, expected in zip([batches[0], *batches], case["results"]["after_each"], strict=True):
        found = running.see(batch)
        assert found.scale.item() == pytest.approx(expected["delta"], rel=1e-9)
        assert found.zero.item() == expected["zero_point"]
        if "x_min" in expected:
            ends = [end.item() for end in running.ends]
            assert ends == pytest.approx([expected["x_min"], expected["x_max"]], rel=1e-9)
    out = dequantise(quantise(batches[0], found.scale, found.zero, 8), found.scale, found.zero)
    assert_golden(out, case["results"]["output"])


class Residual(nn.Module):
    """The residual block of the published U-Net, as far as its time goes."""

    def __init__(self, width: int, wide: int, time: int) -> None:
        super().__init__()
        self.conv1, self.temb_proj = nn.Conv2d(width, wide, 3, padding=1), nn.Linear(time, wide)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return self.conv1(F.silu(x)) + self.temb_proj(F.silu(temb))[:, :, None, None]


class UNet(nn.Module):
    """The time path of the published U-Net of 32 channels, in its names, and a column of what reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(32, 128), nn.Linear(128, 128)])
        self.conv_in, self.conv_out = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 3, 3, padding=1)
        wide = (("down.0.block.0", 32, 32), ("down.1.block.0", 32, 64), ("mid.block_1", 64, 64),
                ("mid.block_2", 64, 64), ("up.0.block.0", 64, 32), ("up.0.block.1", 32, 32),
                ("up.1.block.0", 32, 64), ("up.1.block.1", 64, 64))  # fmt: skip
        self.names = [name for name, *_ in wide]
        for name, a, b in wide:
            place: nn.Module = self
            *parents, leaf = name.split(".")
            for parent in parents:
                if not hasattr(place, parent):
                    place.add_module(parent, nn.Module())
                place = getattr(place, parent)
            place.add_module(leaf, Residual(a, b, 128))
        self.last = nn.Conv2d(64, 32, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        half = 16
        rate = torch.exp(
            torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1))
        )
        angle = t.float()[:, None] * rate[None]
        wave = torch.cat([angle.sin(), angle.cos()], 1).to(x.dtype)
        temb = self.temb.dense[1](F.silu(self.temb.dense[0](wave)))
        h = self.conv_in(x)
        for name in self.names:
            h = self.get_submodule(name)(h, temb)
        return self.conv_out(self.last(h))


@cache
def unet() -> tuple[UNet, TimePath, dict[str, Tensor]]:
    """The network with the formula's weights, its time path for 4 rows, and its tensors."""
    with float64():
        net = UNet().eval()
    state = net.state_dict()
    for name, value in state.items():
        state[name] = formula.weight(name, tuple(value.shape))
    net.load_state_dict(state)
    t = torch.zeros(4, dtype=torch.float64)
    path = find_time_path(net, {"x": torch.zeros(4, 3, 8, 8, dtype=torch.float64), "t": t}, 4)
    return net, path, {name: v.detach() for name, v in net.named_parameters()}


def rows_of(times: list[int]) -> dict[str, Tensor]:
    return {"t": torch.tensor(times, dtype=torch.float64)}


def test_the_time_path_and_what_is_left_of_it():
    expected = CASES[UNET]["results"]
    _, path, _ = unet()
    assert list(path.features) == expected["time_path"] == expected["tib"]["per_block"]
    assert list(path.shared) == expected["tib"]["shared"]
    assert [n for n in expected["weights_left_in_full_precision"] if "conv" not in n] == list(path.first)


def test_features_and_their_cosines():
    case = CASES[FEATURES]
    (net, path, weights), rows = unet(), rows_of(case["t"])
    full = features(path, rows, weights)
    layers = {name: Rounded(net.get_submodule(name), 4) for name in path.layers if name not in path.first}
    nearest = {**weights, **{f"{n}.weight": layer.weights("nearest") for n, layer in layers.items()}}
    own = features(path, rows, nearest)
    for found, key in ((full, "full"), (own, "nearest")):
        for one, expected in zip(found, case["results"][key], strict=True):
            assert_golden(one, expected, WITH_TIME)
    cosine = [F.cosine_similarity(a, b, -1).tolist() for a, b in zip(own, full, strict=True)]
    for found, expected in zip(cosine, case["results"]["cosine"], strict=True):
        assert found == pytest.approx(expected, rel=WITH_TIME)


def test_the_time_path_is_reconstructed():
    case = CASES[TIAR]
    expected: dict[str, Any] = case["results"]
    (net, path, weights), rows = unet(), rows_of(case["t"])
    layers = {name: Rounded(net.get_submodule(name), 4) for name in path.layers if name not in path.first}
    losses: list[float] = []
    settings = Rounding(iterations=40, batch=4, weight=1e-6)
    learn_features(path, rows, weights, layers, settings, watch=lambda _, loss: losses.append(loss))
    assert losses[:5] == pytest.approx(expected["loss_first_5"], rel=WITH_TIME)
    assert losses[7:10] == pytest.approx(expected["loss_at_20_percent"], rel=WITH_TIME)
    assert losses[-1] == pytest.approx(expected["loss_last"], rel=WITH_TIME)
    for name, layer in layers.items():
        assert layer.alpha.sum().item() == pytest.approx(
            expected["alpha_sums"][name], rel=10 * WITH_TIME, abs=1e-4
        )
        assert int((layer.alpha >= 0).sum()) == expected["up_counts"][name]
