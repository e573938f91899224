"""What the tests of contiguous spans share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hosts_support as hosts
from rig import noise

sys.path.insert(0, str(Path(__file__).parent / "scripts"))

from toy_run import Pictures, settings, toy_model

import ditkit
from ditkit.compress import Calibration, recording
from ditkit.core.cond import Cond
from ditkit.core.model import Model

__all__ = ["Pictures", "settings", "toy_model"]

COND = Cond(label=torch.tensor([0, 2]))
T = torch.tensor([0.3, 0.8])
TWO_STREAMS = ("flux", "sd3.5", "qwen-image")
RANDOM = ("hidden_states", "encoder_hidden_states")


@torch.no_grad()
def out(model: Model) -> Tensor:
    """What the tiny DiT says of noise."""
    return model.eval()(noise(), T, COND)


def same(one: Model, other: Model) -> bool:
    """Whether two models have the same tensors, to the bit."""
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(v, states[1][k]) for k, v in states[0].items()
    )


def drawn(seed: int) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def on_host(name: str, *transforms: Any, calls: int = 6, depth: int = 4) -> tuple[Any, dict[str, Any]]:
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
