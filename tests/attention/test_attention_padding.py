"""What stands in padded slots, and in padded rows of text, changes no bit of a prediction.

Models blank out padded text before they embed it, so that a prompt cannot say whether attention leaves it out: here
both are disturbed behind the embedding, in all evaluations of a trajectory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from test_attention_reshaped_models import GRID, sampled
from torch import nn

from ditkit.attention import Band, Grouped, Neighbourhood, Reshaped, ReshapedGrouped
from ditkit.attention.pattern import Pattern
from ditkit.attention.reshaped import Reshape
from ditkit.core.cond import Cond
from ditkit.core.grid import image_of
from ditkit.core.policy import Claim, Policy, Session
from ditkit.core.run import Call, Handler, Site, named
from ditkit.nn.rotary import RotaryTokens
from patterns_support import planned_mask, prompt, tiny_clip_model

TEXT, TOTAL = 7, 5


@dataclass(frozen=True)
class Disturbed(Policy):
    """Noise of 1e3 on embedded tokens: where `of` pads and where text is padding, or on the `real` rows instead."""

    of: Pattern
    real: bool = False

    def claims(self, sites: Sequence[Site]) -> Mapping[str, Claim]:
        return dict.fromkeys(named(sites, "tokens"), "wrap")

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> Disturbing:
        return Disturbing(self, named(sites, "tokens"))

    def exact(self) -> Disturbed:
        raise NotImplementedError


class Disturbing(Session):
    def __init__(self, policy: Disturbed, tokens: list[str]) -> None:
        super().__init__()
        self.policy, self.tokens = policy, tokens

    def enter(self, call: Call) -> Mapping[str, Handler]:
        return dict.fromkeys(self.tokens, partial(self.disturb, call))

    def disturb(self, call: Call, fn: Handler, *args: Any) -> RotaryTokens:
        """Outside of the pattern, which has put the image's rows in its slots, behind the text."""
        out: RotaryTokens = fn(*args)
        order = self.policy.of.plan(image_of(call.layout).grid, 0).order
        assert order is not None
        real = (order >= 0).expand(len(out.x), -1)
        if out.rotary.valid is not None:
            real = torch.cat((out.rotary.valid, real), 1)
        draw = torch.Generator().manual_seed(call.index)
        noise = 1e3 * torch.randn(out.x.shape, generator=draw, dtype=out.x.dtype)
        return out._replace(x=torch.where((real == self.policy.real)[..., None], out.x + noise, out.x))


PATTERNS: dict[str, Pattern] = {
    "groups": Grouped(group=(4, 4, 4), reach=0, block=8, kernel="cpu", warmup=2),
    "criss-cross": Grouped(group=(2, 4, 4), meeting="crisscross", block=8, kernel="reference", warmup=2),
    "one dense layer": Grouped(group=(4, 4, 4), reach=0, block=8, kernel="cpu", dense=(0,)),
    "band": Band(keep=0.2, block=64, kernel="cpu", warmup=2),
    "circle": Neighbourhood(radius=2, span=2, block=16, kernel="cpu", warmup=2),
    "circle in raster order": Neighbourhood(radius=2, span=2, block=64, order="raster", kernel="cpu"),
    "circle with pooled keys": Neighbourhood(radius=2, span=2, pooled=2, block=16, kernel="cpu", warmup=2),
    "reshaped band": Reshaped(keep=0.2, block=64, kernel="cpu", warmup=2),
    "reshaped groups": ReshapedGrouped(group=(4, 4, 4), reach=0, block=8, kernel="cpu", warmup=2),
}
patterns = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)


@patterns
@pytest.mark.parametrize("text", [0, TEXT])
def test_what_is_padding_changes_no_bit(pattern: Pattern, text: int) -> None:
    """Two dense evaluations, then three by the pattern: of the reshaped ones the first is cached, two are reused."""
    plan = pattern.plan(GRID, text)
    assert plan.order is not None and (plan.order < 0).any() and not planned_mask(plan).all()
    model, cond = tiny_clip_model(text), prompt(3, (7, 3, 1)) if text else Cond()
    steps, trajectory = sampled(model, [pattern], cond, TOTAL)
    disturbed, _ = sampled(model, [pattern, Disturbed(pattern)], cond, TOTAL)
    assert all(map(torch.equal, steps, disturbed))
    (receipt,) = trajectory.finish()
    first = pattern.warmup + isinstance(pattern, Reshape)
    assert receipt.as_dict()["lanes"]["cond"]["sparse"] == f"{first}-4"


@pytest.mark.parametrize("text", [0, TEXT])
def test_what_is_not_padding_changes_all(text: int) -> None:
    """So noise that is put in there does reach attention."""
    model, cond = tiny_clip_model(text), prompt(3, (7, 3, 1)) if text else Cond()
    pattern = PATTERNS["groups"]
    steps, _ = sampled(model, [pattern], cond, TOTAL)
    disturbed, _ = sampled(model, [pattern, Disturbed(pattern, real=True)], cond, TOTAL)
    assert not any(torch.allclose(*pair, atol=1e-3) for pair in zip(steps, disturbed, strict=True))
