"""DTR's windows, block, network, guidance and Min-SNR weight against byeongjun-park/DTR."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import formula
from ditkit.adapt.task_routing import TaskRouting, routed
from ditkit.core.cond import Cond
from ditkit.core.convention import DDPM
from ditkit.core.ddpm import DISCRETE
from ditkit.core.errors import CheckpointError
from ditkit.core.model import parameter_count
from ditkit.models.dit import DiT, DiTConfig
from ditkit.nn.blocks import Block
from ditkit.nn.task_windows import active, offsets, windows
from ditkit.sample.guidance import ClassifierFree
from ditkit.train.denoising import NoisyBatch
from ditkit.train.taps import run_with_taps
from ditkit.train.terms.min_snr import MinSNR
from ditkit.train.terms.uncertainty import LogVariances, UncertaintyWeighting
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


def published(*policies: TaskRouting, table: torch.Tensor | None = None) -> DiT:
    """Return the published network, whose weights hold each block's table of masks."""
    constructor = read(SYSTEM)["forward"]["constructor"]["DiT(router=TaskRouter)"]
    table = windows(EVERY, 24, 0.8, 4.0).double() if table is None else table
    tables = {f"blocks.{i}.routing._unit_mapping": table for i in range(3)}
    state = {"pos_embed": torch.zeros(1), **formula.weights(adaln_shapes(constructor, outs=8)), **tables}
    config = DiTConfig(size=8, patch=2, channels=4, width=24, depth=3, heads=3, classes=10, convention=DDPM)
    with float64():
        return DiT.from_original(state, config, policies)


def test_published_weights_load_under_their_routing_only() -> None:
    model = published(TaskRouting())
    assert model.policies == (TaskRouting(),) and not any("routing" in name for name in model.state_dict())
    with pytest.raises(CheckpointError, match=r"blocks\.0\.routing\._unit_mapping"):
        published()
    with pytest.raises(CheckpointError, match=r"other masks than those of TaskRouting.*9 of 24 channels"):
        published(TaskRouting(), table=windows(EVERY, 24, 0.4, 4.0).double())


def out(case: Mapping[str, Any]) -> torch.Tensor:
    model, given = published(TaskRouting()), case["inputs"]
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


def test_guidance_on_all_channels() -> None:
    """The published batch holds a label's half and the null class's; its answer is the guided prediction twice."""
    case = read(SYSTEM)["guided"]
    model, t = published(TaskRouting()), torch.tensor(case["inputs"]["t"][:1])
    half = formula.tensor(*case["inputs"]["x"])[:1]
    times = ((t + 1) / 1000).double()

    def branches(*names: str) -> tuple[torch.Tensor, ...]:
        label = {"cond": torch.tensor([3]), "uncond": torch.tensor([10])}
        conds = [Cond(label=label[name]) for name in names]
        outs = [
            run_with_taps(model, model, (), (4, 8, 8), half, t.double(), c, times=times).out for c in conds
        ]
        both.extend(out[:, 4:] for out in outs)
        return tuple(out[:, :4] for out in outs)

    both: list[torch.Tensor] = []
    guided = ClassifierFree(1.5)(branches, 0.5)
    whole = torch.cat([torch.cat([guided, extra], 1) for extra in both]).detach()
    assert_golden(whole, case["expect"]["output"], TOLERANCE)


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


def noisy(kind: str, own: Any = None) -> tuple[NoisyBatch, Any]:
    """Return the batch of the published losses, and what they are under a kind of weights."""
    case = read(SYSTEM)["losses"]
    data, noise, both = (formula.tensor(*case["inputs"][name]) for name in ("x0", "eps", "out"))
    t, path = torch.tensor(case["inputs"]["t"]), DDPM.make_path()
    prediction, fraction = DDPM.split(both)
    batch = NoisyBatch(
        path=path, convention=DDPM, data=data, noise=noise, x=path.mix(data, noise, t.double()), t=t,
        prediction=prediction, fraction=fraction, taps={}, own=own,
    )  # fmt: skip
    return batch, case["expect"][kind]


def test_min_snr() -> None:
    batch, expected = noisy("min_snr_5")
    assert MinSNR().loss(batch).tolist() == pytest.approx(expected["mse"], rel=1e-9)
    assert VariationalBound().loss(batch).tolist() == pytest.approx(expected["vb"], rel=1e-6)


def test_uncertainty_weighting() -> None:
    own = LogVariances(8).double()
    with torch.no_grad():
        own.s.copy_(formula.tensor("loss_scale", [8]))
    batch, expected = noisy("uw", own)
    term = UncertaintyWeighting()
    assert term.cluster(batch).tolist() == list(range(8))
    assert term.loss(batch).mean().item() == pytest.approx(expected["loss"], rel=1e-9)


def test_the_bounds_of_clusters_and_the_schedules() -> None:
    case = read(SYSTEM)["schedules"]
    index, expected = torch.tensor(case["inputs"]["index"]), case["expect"]
    batch, _ = noisy("constant")
    every = UncertaintyWeighting().cluster(replace(batch, t=EVERY))
    for i, (first, stop) in enumerate(expected["clusters"]):
        assert (every == i).nonzero().flatten().tolist() == list(range(first, stop))
    for name, path in (("cosine", DISCRETE["ddpm-cosine"]()), ("linear", DISCRETE["ddpm"]())):
        assert path.abar[index].tolist() == pytest.approx(expected[name]["alpha_bar"], rel=1e-9)
        assert path.beta[index].tolist() == pytest.approx(expected[name]["beta"], rel=1e-9)


def test_parameters() -> None:
    for name, count in read(SYSTEM)["parameters"]["expect"].items():
        with torch.device("meta"):
            model = DiT.preset(name.removeprefix("DiT-"))
            assert parameter_count(model) + 256 * model.config.width == count
            assert not model.adopt([TaskRouting()]).learned
