"""VDT's forward pass, masked loss and masked sampling against RERV/VDT."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

import formula
from ditkit.core.cond import Cond
from ditkit.core.convention import DDPM
from ditkit.core.ddpm import DiscretePath
from ditkit.core.trajectory import Trajectory
from ditkit.models.dit import renamed
from ditkit.models.vdt import VDT, VDTConfig
from ditkit.sample.denoiser import GuidedDenoiser
from ditkit.sample.guidance import Unguided
from ditkit.sample.solvers import Ancestral
from ditkit.tasks.video.masks import KINDS
from ditkit.train.denoising import NoisyBatch
from ditkit.train.terms.regression import Regression
from ditkit.train.terms.variational_bound import VariationalBound
from golden_support import (
    Case,
    GivenNoise,
    adaln_shapes,
    adaln_state,
    assert_golden,
    cases,
    float64,
    read,
    with_time,
)

SYSTEM = "07-vdt"
IN_FLOAT32 = with_time(1e-6)
"""The published position tables are summed in float32."""
TEMPORAL_NAMES = {
    r"\.temporal_norm1\.": ".temporal_attn.norm.",
    r"\.temporal_fc\.": ".temporal_attn.fc.",
    r"\.temporal_attn\.qkv\.": ".temporal_attn.attn.qkv.",
    r"\.temporal_attn\.proj\.": ".temporal_attn.attn.out.",
}
KIND_NAMES = {"0": "predict", "2": "interpolate", "3": "unconditional"}
"""Of the published generator's kinds, those that draw nothing."""


def state(constructor: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the weights under our names: DiT's, and those of attention along time."""
    width = constructor["hidden_size"]
    shapes = adaln_shapes(constructor, outs=2 * constructor["in_channels"])
    for i in range(constructor["depth"]):
        at = f"blocks.{i}.temporal_"
        for layer, shape in (
            ("attn.qkv", (3 * width, width)),
            ("attn.proj", (width, width)),
            ("fc", (width, width)),
        ):
            shapes |= {f"{at}{layer}.weight": shape, f"{at}{layer}.bias": shape[:1]}
        shapes |= {f"{at}norm1.weight": (width,), f"{at}norm1.bias": (width,)}
    found = renamed(adaln_state(shapes))
    for pattern, ours in TEMPORAL_NAMES.items():
        found = {re.sub(pattern, ours, name): value for name, value in found.items()}
    return found


@cache
def model_of(channels: int, frames: int) -> VDT:
    config = VDTConfig(channels, frames, size=8, patch=2, width=48, depth=3, heads=4)
    (constructor,) = {
        tuple(case["constructor"].items())
        for case in read(SYSTEM).values()
        if (case["constructor"]["in_channels"], case["constructor"]["num_frames"]) == (channels, frames)
    }
    with float64():
        return VDT.holding(config, state(dict(constructor)), SYSTEM).eval()


def model(case: Case) -> VDT:
    return model_of(case["constructor"]["in_channels"], case["constructor"]["num_frames"])


def mask_of(told: Mapping[str, Any]) -> Tensor:
    """Return the mask of a case, [1, 1, 16, 8, 8], 1 where content is to be made."""
    mask = torch.zeros(1, 1, 16, 8, 8)
    mask[:, :, told["made_frames"]] = 1
    cells = told.get("made cells (row*8+column) of the first frame that has some", [])
    for frame, count in enumerate(told.get("cells", [])):
        if count:
            mask[0, 0, frame].view(-1)[cells] = 1
            assert count == len(cells)
    return mask


def clip() -> Tensor:
    """Return the clean clip, [2, 4, 16, 8, 8]."""
    return 0.5 * formula.tensor("vl.x", (2, 16, 4, 8, 8)).transpose(1, 2)


@cases(SYSTEM, lambda case: "forward" in case["name"])
@torch.no_grad()
def test_forward(case: Case) -> None:
    ((name, shape),) = case["inputs"].items()
    x = formula.tensor(name, shape).transpose(1, 2)
    out = model(case)(x, torch.tensor(case["t"]).double(), Cond())
    assert_golden(out.transpose(1, 2), case["results"]["output"], IN_FLOAT32)


@cases(SYSTEM, lambda case: "loss" in case["name"])
@torch.no_grad()
def test_masked_loss(case: Case) -> None:
    """The published bound also learns the variance of given content: `on_given`."""
    expected, path, t = case["results"], DiscretePath.linear(), torch.tensor([7, 640])
    assert f"t={t.tolist()}" in case["called"]
    data, noise = clip(), formula.tensor("vl.noise", (2, 4, 16, 8, 8))
    mask = mask_of(expected["mask"]).expand(2, -1, -1, -1, -1)
    x = path.mix(data, noise, t.double())
    out = model(case)(x, t.double(), Cond(context=data, mask=mask))
    prediction, fraction = DDPM.split(out)
    batch = NoisyBatch(
        path=path, convention=DDPM, data=data, noise=noise, x=x, t=t, prediction=prediction, fraction=fraction,
        mask=mask, taps={},
    )  # fmt: skip
    mse, bound = Regression().loss(batch), VariationalBound(on_given=True).loss(batch)
    for found, name in ((mse, "mse"), (bound, "vb"), (mse + bound, "loss")):
        assert_golden(found, expected[name], IN_FLOAT32)


@cases(SYSTEM, lambda case: case["name"][-1] in KIND_NAMES and "mask kind" in case["name"])
def test_masks_that_draw_nothing(case: Case) -> None:
    found = KINDS[KIND_NAMES[case["name"][-1]]]((16, 8, 8), torch.Generator())
    assert torch.equal(found[None].float(), mask_of(case["results"]["mask"]))


@cases(SYSTEM, lambda case: "sampling" in case["name"])
@torch.no_grad()
def test_masked_sampling(case: Case) -> None:
    shape = (2, 4, 16, 8, 8)
    mask = torch.ones(2, 1, *shape[2:])
    mask[:, :, case["results"]["given_frames"]] = 0
    cond = Cond(context=clip(), mask=mask)
    vdt = model(case)
    field: Any = GuidedDenoiser(vdt, cond, Unguided(), Trajectory(vdt.sites(), (), 10))
    noise: Any = GivenNoise("vs", shape)
    x = Ancestral().solve(field, formula.tensor("vs.z", shape), 10, noise)
    assert case["results"]["output_shape"] == list(x.shape)
    assert_golden(x, case["results"]["output"], IN_FLOAT32)
