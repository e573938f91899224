"""Two stages of fine-tuning under SLA: maps on dense activations, then all weights with rates of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.attention import SparseLinear
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.core.run import Run
from ditkit.core.trajectory import Trajectory
from ditkit.recipes.sla import MAP, sla, sla_align, sla_finish
from ditkit.train.aligning import Aligning
from ditkit.train.denoising import Denoising
from ditkit.train.loop import train
from ditkit.train.settings import Group, Settings
from ditkit.train.teacher import Held
from ditkit.train.terms.distillation import AttentionDistillation
from ditkit.train.terms.regression import Regression
from patterns_support import prompt, tiny_clip_model

POLICY = SparseLinear(critical=0.2, negligible=0.2, block=8, kernel="cpu")


class Clips:
    """Four clips of noise, of one class."""

    data = torch.randn(4, 2, 2, 10, 12, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return 4

    def batch(self, indices: Tensor, rng: Any) -> tuple[Tensor, Cond]:
        return self.data[indices], Cond()


def student(text: int = 0, tile: tuple[int, int, int] = (1, 1, 1)) -> Any:
    return tiny_clip_model(text, frames=2, size=(10, 12)).float().adopt([replace(POLICY, tile=tile)])


def aligned(model: Any, cond: Cond, data: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
    teacher = tiny_clip_model(
        cond.text.shape[1] if cond.text is not None else 0, frames=2, size=(10, 12)
    ).float()
    return Aligning().at(
        model, model, path=model.config.convention.make_path(), data=data, noise=noise, t=t, cond=cond,
        held=Held(teachers={"AttentionDistillation": teacher.requires_grad_(False)}),
    )  # fmt: skip


@pytest.mark.parametrize("tile", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("text", [0, 7])
def test_each_attention_is_compared_on_dense_activations(text: int, tile: tuple[int, int, int]) -> None:
    """By hand: the dense network's queries, keys and values, in one attention each under the policy."""
    model = student(text, tile)
    data, noise = torch.randn(2, 2, 2, 2, 10, 12, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([0.3, 0.7])
    cond = replace(prompt(2, (7, 3)), drop=torch.zeros(2, dtype=torch.bool)) if text else Cond()
    if cond.text is not None:
        cond = replace(cond, text=cond.text.float())
    found = aligned(model, cond, data, noise, t)
    met: dict[str, tuple[Any, Tensor]] = {}

    class Noting(Run):
        def site(self, name: str, fn: Any, *args: Any) -> Any:
            out = fn(*args)
            if name.endswith(".core"):
                met[name] = args, out
            return out

    x = model.config.convention.make_path().mix(data, noise, t)
    with torch.no_grad():
        model(x, t, cond, Noting())
    errors = []
    for name, (args, dense) in met.items():
        own = under_policy(model, name, x, t, cond, args)
        errors.append((own - dense).square().mean())
    assert torch.allclose(found["loss"], torch.stack(errors).mean(), rtol=1e-5)
    found["loss"].backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(grads) == {n for n, _ in model.named_parameters() if n.startswith("learned.")}
    assert all(g.abs().max() > 0 for n, g in grads.items() if n.endswith("weight"))


def under_policy(model: Any, name: str, x: Tensor, t: Tensor, cond: Cond, args: Any) -> Tensor:
    """One attention of a model whose others are dense, given these arguments in the model's order."""
    from ditkit.core.run import Call

    trajectory = Trajectory(model.sites(), model.policies, 1, learned=model.learned)
    call = Call(0, 1, 0.5, layout=model.layout(tuple(x.shape[1:])))
    rows = trajectory.rows(call).get(name)
    run, kept = trajectory.run(call), []

    class Placed(Run):
        """Blocks in the policy's order of rows; at the attention, what is given, in that order."""

        def site(self, at: str, fn: Any, *inner: Any) -> Any:
            if at == name:
                q, k, v = args[:3]
                if rows is not None:
                    q, k, v = (torch.zeros_like(inner[0]).index_copy(2, rows, y) for y in (q, k, v))
                kept.append(run.site(at, fn, q, k, v, *args[3:]))
                return inner[0] * 0
            return fn(*inner) if at.endswith(".core") else run.site(at, fn, *inner)

    with torch.no_grad():
        model(x, t, cond, Placed())
    return kept[0] if rows is None else kept[0][:, :, rows]


def settings(steps: int, **more: Any) -> Settings:
    return Settings(steps=steps, batch=2, learning_rate=1e-2, save_every=0, sheet_every=0, **more)


def test_two_stages_train_what_they_say(tmp_path: Path) -> None:
    start = tiny_clip_model(frames=2, size=(10, 12)).float()
    before = {k: v.clone() for k, v in start.state_dict().items()}
    teacher = tiny_clip_model(frames=2, size=(10, 12)).float()
    one = train(
        start.adopt([POLICY]),
        Clips(),
        Aligning(),
        settings(6, trained=MAP),
        tmp_path / "one",
        start=lambda: teacher,
    )
    state = one.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items())
    maps = {name: value for name, value in state.items() if name.startswith("learned.")}
    assert maps and all(value.abs().max() > 1e-3 for value in maps.values())
    after = {k: v.clone() for k, v in state.items()}
    two = train(one, Clips(), Denoising(), settings(2, groups=(Group(MAP, 5.0),)), tmp_path / "two")
    moved = [name for name, value in two.state_dict().items() if not torch.equal(value, after[name])]
    assert any(name.startswith("learned.") for name in moved) and any(
        name.startswith("blocks.") for name in moved
    )
    assert two.policies == (POLICY,)


def test_aligning_lowers_its_loss() -> None:
    model, draw = student(), torch.Generator().manual_seed(3)
    data, noise = torch.randn(2, 2, 2, 2, 10, 12, generator=draw)
    adam = torch.optim.Adam(model.learned.parameters(), 1e-2)
    losses = []
    for _ in range(25):
        adam.zero_grad()
        loss = aligned(model, Cond(), data, noise, torch.tensor([0.3, 0.7]))["loss"]
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_what_does_not_fit_is_refused_before_the_first_step() -> None:
    with pytest.raises(ConfigError, match="no policy has attention of its own, so there is nothing to align"):
        Aligning().check(tiny_clip_model().float())
    terms = (Regression(), AttentionDistillation(every=1))
    with pytest.raises(ConfigError, match="Regression needs the model's prediction"):
        Aligning(terms).check(student())


def test_recipes_are_one_stage_and_two() -> None:
    one, first, second = sla(), sla_align(), sla_finish()
    assert one.policies == first.policies == second.policies and one.init == "digits-video-dit"
    assert isinstance(first.objective, Aligning) and first.settings.trained == MAP
    assert second.settings.groups == (Group(MAP, 5.0),) and second.settings.learning_rate == 1e-5
