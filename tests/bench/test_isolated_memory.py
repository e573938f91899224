"""What another process is told, so that it can measure peak memory, and what cannot be told."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch

from ditkit.api.compare import compare
from ditkit.bench.memory import describe, revive
from ditkit.caching.taylorseer import TaylorSeer
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError, DitkitError
from ditkit.sample import Autoguidance, ClassifierFree, DiffusersScheduler, Sampler
from rig import tiny_dit

STEPS, SEEDS = 12, (0, 1, 2)


@dataclass(frozen=True)
class Typed(TaylorSeer):
    """As a policy typed at a prompt: its module is `__main__`."""

    __module__ = "__main__"


def test_what_memory_cannot_be_measured_for_is_refused_before_anything_is_drawn(monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setattr(Sampler, "draw", lambda *_, **__: pytest.fail("drawn"))
    scheduler = DiffusersScheduler(diffusers.FlowMatchEulerDiscreteScheduler())
    for policies, settings in (([Typed()], {}), ([], {"solver": scheduler})):
        with pytest.raises(ConfigError, match="or pass memory=False"):
            compare(tiny_dit(), policies=policies, seeds=SEEDS, steps=STEPS, **settings)


def test_another_process_is_told_the_same_work(tmp_path):
    guide = tiny_dit(seed=1)
    guidance = Autoguidance(1.5, guide)
    model, cond = tiny_dit(), Cond(label=torch.tensor([0, 1, 2]))
    work = Sampler.of(model, cond=cond, seeds=SEEDS, steps=STEPS, guidance=guidance, batch_size=2)
    again, policies = revive(json.loads(json.dumps(describe(work, tmp_path)))), [TaylorSeer(interval=4)]
    assert torch.equal(again.draw(policies=policies).samples, work.draw(policies=policies).samples)
    interval = ClassifierFree(2.0, interval=(0.2, 0.8))
    assert revive(json.loads(json.dumps(describe(interval, tmp_path)))) == interval


def test_what_cannot_be_told_to_another_process_is_refused(tmp_path):
    diffusers = pytest.importorskip("diffusers")

    @dataclass(frozen=True)
    class Local:
        size: int = 1

    for value in (Local(), DiffusersScheduler(diffusers.FlowMatchEulerDiscreteScheduler())):
        with pytest.raises(DitkitError, match="or pass memory=False"):
            describe(value, tmp_path)
