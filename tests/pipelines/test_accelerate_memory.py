"""`max_bytes`: refused before the first block, in one line that says what would fit, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ditkit
from ditkit.caching.taylorseer import Forecaster, TaylorSeer
from ditkit.core.errors import ConfigError
from ditkit.core.policy import Session
from ditkit.core.run import Call
from ditkit.core.trajectory import Trajectory
from ditkit.hosts import flux
from ditkit.hosts.streams import Streams
from ditkit.hosts.view import view
from family_pipelines_support import ONE_EACH, draw, ready
from flux_support import DOUBLE, SINGLE, D, S, transformer
from pipelines_support import POLICY, SIDE, STEPS, asked, latents, pipeline

PARABOLA = TaylorSeer(interval=3, order=2)
ROWS = (SIDE // 4) ** 2
FACTOR = 4 * D * (DOUBLE * 2 + SINGLE) * (ROWS + S)
"""One factor of all branches of one lane of the small FLUX: a double block has as much to keep as two single ones."""


def ran(pipe: Any) -> list[nn.Module]:
    """The blocks that are called from now on."""
    calls: list[nn.Module] = []
    for block in (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks):
        block.register_forward_pre_hook(lambda block, _: calls.append(block))
    return calls


@pytest.mark.parametrize(
    ("allowed", "hint"),
    [
        (3 * FACTOR - 1, "order=1 would fit"),
        (2 * FACTOR, "order=1 would fit"),
        (2 * FACTOR - 1, "order=0 would fit"),
        (FACTOR - 1, f"order=0 would hold {FACTOR:,}"),
    ],
)
def test_refused_before_the_first_block_with_what_would_fit(allowed: int, hint: str) -> None:
    pipe = pipeline()
    exact, blocks = latents(pipe, asked()), ran(pipe)
    with ditkit.accelerate(pipe, PARABOLA, max_bytes=allowed) as fast:
        for _ in range(2):
            with pytest.raises(ConfigError) as refusal:
                latents(fast, asked())
            assert str(refusal.value) == (
                f"max_bytes={allowed:,}: {PARABOLA} would hold {3 * FACTOR:,} bytes; {hint}"
            )
        assert not blocks
        assert torch.equal(latents(pipe, asked()), exact)
    assert torch.equal(latents(pipe, asked()), exact)


def test_what_the_message_proposes_fits() -> None:
    pipe = pipeline()
    drawn = latents(ditkit.accelerate(pipe, POLICY), asked())
    fast = ditkit.accelerate(pipe, POLICY, max_bytes=2 * FACTOR)
    assert torch.equal(latents(fast, asked()), drawn)
    assert fast.report().cost.policy_bytes == 2 * FACTOR


class Keeping(Session):
    """Holds one factor, and knows no setting that holds less."""

    def projected_bytes(self) -> int:
        return FACTOR


def test_what_other_policies_hold_leaves_less() -> None:
    sites = flux.sites(view(transformer()))
    trajectory = Trajectory(sites, [PARABOLA], STEPS, max_bytes=3 * FACTOR)
    trajectory.sessions.append(Keeping())
    embedded = Streams(torch.empty(1, ROWS, D), torch.empty(1, S, D))
    with pytest.raises(ConfigError, match=f"would hold {4 * FACTOR:,} bytes; order=1 would fit$"):
        trajectory._foresee(Call(0, STEPS, 1.0), lambda: embedded)


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("family", ONE_EACH)
def test_the_first_evaluation_is_foreseen(family: str, mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By as much as it turns out to need; in SD3, with the text that its last attention does not return.

    Under autocast perhaps by less, where a branch ends with a norm: what is left is refused after the evaluation.
    """
    foreseen: list[int] = []
    needed: list[int] = []
    foresee, commit = Forecaster.foreseen_bytes, Forecaster.commit

    def foreseeing(self: Forecaster, call: Call, embedded: Any) -> int:
        foreseen.append(foresee(self, call, embedded))
        return foreseen[-1]

    def committing(self: Forecaster) -> None:
        commit(self)
        needed.append(self.projected_bytes())

    monkeypatch.setattr(Forecaster, "foreseen_bytes", foreseeing)
    monkeypatch.setattr(Forecaster, "commit", committing)
    pipe, told = ready(ONE_EACH[family])
    with torch.autocast("cpu", torch.bfloat16, mixed):
        draw(ditkit.accelerate(pipe, PARABOLA, max_bytes=10**9), told)
    unreturned = 3 * (1 if mixed else 2) * told["prompt_embeds"].nbytes if family == "sd3" else 0
    assert 0 < foreseen[0] <= needed[0] + unreturned
    assert mixed or foreseen[0] >= needed[0]
