"""DTR's windows, block, network, guidance and Min-SNR weight against byeongjun-park/DTR."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch

import formula
from ditkit.adapt.task_routing import TaskRouting, routed
from ditkit.core.cond import Cond
from ditkit.core.convention import DDPM
from ditkit.core.model import parameter_count
from ditkit.models.dit import DiT, DiTConfig
from ditkit.nn.blocks import Block
from ditkit.nn.task_windows import active, offsets, windows
from ditkit.train.denoising import NoisyBatch
from ditkit.train.taps import run_with_taps
from ditkit.train.terms.min_snr import MinSNR
from ditkit.train.terms.variational_bound import VariationalBound
from golden_support import adaln_shapes, assert_golden, float64, read, with_time

SYSTEM = "39-dtr"
TOLERANCE = with_time(1e-6)
EVERY = torch.arange(1000)


@pytest.mark.parametrize("name", read(SYSTEM)["masks"]["expect"])
def test_masks(name: str) -> None:
    golden = read(SYSTEM)["masks"]["expect"][name]
    channels, share, _, alpha = (float(number) for number in re.findall(r"[\d.]+", name))
    first = offsets(EVERY, int(channels), share, alpha)
    assert [active(int(channels), share)] == golden["active"] and int(first.sum()) == golden[
        "checksum_sum_of_offsets"
    ]
    assert {t: int(first[int(t)]) for t in golden["offset_at_t"]} == golden["offset_at_t"]
    rows = windows(EVERY, int(channels), share, alpha)
    assert (rows.sum(1) == golden["active"][0]).all() and int(first[-1]) == golden["last_offset"]
    assert (rows.int().diff(dim=1).abs().sum(1) <= 2).all()


def network(depth: int = 3) -> DiT:
    constructor = read(SYSTEM)["forward"]["constructor"]["DiT(router=TaskRouter)"]
    state = formula.weights(adaln_shapes(constructor, outs=8))
    config = DiTConfig(
        size=8, patch=2, channels=4, width=24, depth=depth, heads=3, classes=10, convention=DDPM
    )
    with float64():
        model = DiT.from_original({"pos_embed": torch.zeros(1), **state}, config).eval()
    return model.adopt([TaskRouting()])


def out(case: Mapping[str, Any]) -> torch.Tensor:
    model, given = network(), case["inputs"]
    label, t = torch.tensor(given["y"]), torch.tensor(given["t"])
    cond = Cond(label=label.clamp(max=9), drop=label == 10)
    times = (t + 1) / 1000
    found = run_with_taps(
        model, model, (), (4, 8, 8), formula.tensor(*given["x"]), t.double(), cond, times=times.double()
    )
    result: torch.Tensor = found.out.detach()
    return result


def test_forward() -> None:
    case = read(SYSTEM)["forward"]
    assert_golden(out(case), case["expect"]["output"], TOLERANCE)


def test_block() -> None:
    case = read(SYSTEM)["block"]
    with float64():
        block = Block(20, 4)
    names = {
        "attn.qkv": "attn.qkv",
        "attn.out": "attn.proj",
        "mlp.inner": "mlp.fc1",
        "mlp.outer": "mlp.fc2",
        "modulation": "adaLN_modulation.1",
    }
    state = {}
    for name, value in block.state_dict().items():
        layer, _, kind = name.rpartition(".")
        state[name] = formula.weight(f"{names[layer]}.{kind}", value.shape)
    block.load_state_dict(state)
    x, c = (formula.tensor(*case["inputs"][name]) for name in ("x", "c"))
    task = torch.tensor(case["inputs"]["t"])
    x.requires_grad_(True)
    mask = partial(TaskRouting().mask, task, name="blocks.0")
    assert mask(channels=20).int().tolist() == case["expect"]["mask_rows"]
    result = routed(mask, block, x, c)
    assert_golden(result, case["expect"]["output"], TOLERANCE)
    result.square().sum().backward()
    assert x.grad is not None
    assert_golden(x.grad, case["expect"]["gradient_of_sum_of_squares_wrt_x"], TOLERANCE)


def test_min_snr() -> None:
    case = read(SYSTEM)["losses"]
    data, noise, both = (formula.tensor(*case["inputs"][name]) for name in ("x0", "eps", "out"))
    t, path = torch.tensor(case["inputs"]["t"]), DDPM.make_path()
    prediction, fraction = DDPM.split(both)
    batch = NoisyBatch(
        path=path, convention=DDPM, data=data, noise=noise, x=path.mix(data, noise, t.double()), t=t,
        prediction=prediction, fraction=fraction, taps={},
    )  # fmt: skip
    expected = case["expect"]["min_snr_5"]
    assert MinSNR().loss(batch).tolist() == pytest.approx(expected["mse"], rel=1e-9)
    assert VariationalBound().loss(batch).tolist() == pytest.approx(expected["vb"], rel=1e-6)


def test_parameters() -> None:
    for name, count in read(SYSTEM)["parameters"]["expect"].items():
        with torch.device("meta"):
            model = DiT.preset(name.removeprefix("DiT-"))
            assert parameter_count(model) + 256 * model.config.width == count
            assert not model.adopt([TaskRouting()]).learned
