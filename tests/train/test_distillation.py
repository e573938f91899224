"""CLEAR's fine-tuning: what is compared with the teacher, what learns, and what a saved student keeps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ditkit.api.generate import generate
from ditkit.attention.neighbourhood import Neighbourhood
from ditkit.core.cond import Cond
from ditkit.core.errors import CheckpointError, ConfigError, NoEffectError
from ditkit.core.model import Model, parameter_count
from ditkit.core.run import Call, Run, Site
from ditkit.core.trajectory import Trajectory
from ditkit.models.convlstm import ConvLSTM, ConvLSTMConfig
from ditkit.models.dit import DiT, DiTConfig
from ditkit.models.video_dit import VideoDiT
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Constant
from ditkit.train.forecasting import Forecasting
from ditkit.train.loop import Training, train
from ditkit.train.objective import Batch, Term
from ditkit.train.parts import train_only
from ditkit.train.randomness import SampleRNG
from ditkit.train.settings import Settings
from ditkit.train.teacher import Held
from ditkit.train.terms.distillation import AttentionDistillation, PredictionDistillation
from ditkit.train.terms.regression import Regression
from patterns_support import Masked, circle_meets, prompt, tiny_clip_model

CLEAR = Denoising((Regression(), PredictionDistillation(), AttentionDistillation(every=1)))
CYLINDER = Neighbourhood(radius=3, span=2, block=8, kernel="cpu")
"""Of tiles that reach beyond the grid of 4 x 6 x 10."""
POOLING = {f"learned.Neighbourhood.blocks/{i}/attn/core.weight" for i in (0, 1)}


def small(text: int = 0, **sizes: object) -> VideoDiT:
    return tiny_clip_model(text, **sizes).float()


def told() -> Cond:
    """Prompts of different length, none of which a network in training drops."""
    cond = prompt(2, (7, 3))
    assert cond.text is not None
    return replace(cond, text=cond.text.float(), drop=torch.zeros(2, dtype=torch.bool))


def losses(model: VideoDiT, objective: Denoising = CLEAR, teacher: Model | None = None) -> dict[str, Tensor]:
    """On two clips and prompts of different length, at t = 0.3 and 0.7."""
    data, noise = torch.randn(2, 2, 2, 4, 12, 20, generator=torch.Generator().manual_seed(3))
    if teacher is None:
        teacher = model.with_weights(model.state_dict(), "teacher").requires_grad_(False)
        teacher.policies = ()
    return objective.at(
        model,
        model,
        path=model.config.convention.make_path(),
        data=data,
        noise=noise,
        t=torch.tensor([0.3, 0.7]),
        cond=told(),
        held=Held(teachers={type(term).__name__: teacher for term in objective.active}),
    )


def said(model: VideoDiT, masked: bool) -> tuple[Tensor, list[Tensor]]:
    """Prediction and attention outputs on the same, of a model that no pattern reorders."""
    data, noise = torch.randn(2, 2, 2, 4, 12, 20, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([0.3, 0.7])
    x = model.config.convention.make_path().mix(data, noise, t)
    trajectory = Trajectory(model.sites(), [Masked(circle_meets(CYLINDER))] if masked else [], 1)
    inside, outputs = trajectory.run(Call(0, 1, 0.5, layout=model.layout(tuple(x.shape[1:])))), []

    class Noting(Run):
        def site(self, name, fn, *args):
            out = inside.site(name, fn, *args)
            if name.endswith(".core"):
                outputs.append(out)
            return out

    with torch.no_grad():
        return model(x, t, told(), Noting()), outputs


def test_both_networks_are_compared_row_by_row_on_their_own_activations() -> None:
    """The student's rows are reordered and padded, the teacher's are not."""
    model = small(7)
    (student, own), (teacher, taught) = said(model, True), said(model, False)
    found = losses(model.adopt([CYLINDER]))
    attention = [(a - b).float().square().mean() for a, b in zip(own, taught, strict=True)]
    assert torch.allclose(found["PredictionDistillation"], (student - teacher).float().square().mean())
    assert torch.allclose(found["AttentionDistillation"], torch.stack(attention).mean(), rtol=1e-5)
    total = found["Regression"] + 0.5 * found["PredictionDistillation"] + 0.5 * found["AttentionDistillation"]
    assert torch.allclose(found["loss"], total)
    assert found["AttentionDistillation"] > 1e-3


def test_a_student_without_a_pattern_is_its_teacher() -> None:
    found = losses(small(7))
    assert found["PredictionDistillation"] == 0 and found["AttentionDistillation"] == 0


def test_places_that_are_compared() -> None:
    sites = small(depth=9).sites()
    for given, places in (
        ({}, (0, 4, 8)),
        ({"every": 3, "first": 2}, (3, 6)),
        ({"every": 1, "first": 8}, (8,)),
    ):
        assert AttentionDistillation(**given).taps(sites) == [f"blocks.{i}.attn.core" for i in places]
    with pytest.raises(ConfigError, match="needs attention from place 9 on; the model has 9"):
        Denoising((AttentionDistillation(first=9),)).check(small(depth=9))
    with pytest.raises(ConfigError, match="every=0 should be at least 1"):
        AttentionDistillation(every=0)


def test_no_teacher_is_made_where_nothing_compares_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Model, "with_weights", lambda *_: pytest.fail("copied"))
    weightless = Denoising((Regression(), PredictionDistillation(0.0), AttentionDistillation(0.0)))
    run = Training(small(), Clips(), weightless, Settings(batch=2), tmp_path)
    run.hire()
    assert run.teachers == {}
    with pytest.raises(
        ConfigError, match="Forecasting has no teacher, which PredictionDistillation compares with"
    ):
        Forecasting((Regression(), PredictionDistillation()))


def gradients(model: VideoDiT, objective: Denoising, checkpointing: bool) -> dict[str, Tensor]:
    model.gradient_checkpointing = checkpointing
    model.zero_grad()
    losses(model.train(), objective)["loss"].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def student(**changed: object) -> VideoDiT:
    """A model of two layers that trains its attention under pooled keys."""
    pattern = replace(CYLINDER, pooled=2, **changed)
    model = small(7).adopt([pattern])
    train_only(model, "attention")
    return model


def test_attention_learns_from_its_outputs_also_under_checkpointing() -> None:
    """Taps that blocks fill again when they are recomputed must leave the loss its gradient."""
    objective = Denoising((AttentionDistillation(every=1),))
    plain, again = (gradients(student(), objective, on) for on in (False, True))
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert torch.allclose(again[name], gradient, rtol=1e-5, atol=1e-9), name
    assert all(plain[f"blocks.{i}.attn.qkv.weight"].abs().max() > 1e-6 for i in (0, 1))
    assert all(plain[name].abs().max() > 1e-8 for name in POOLING)


def test_projections_and_pooling_weights_learn_and_nothing_else() -> None:
    model, D = student(), 24
    found = gradients(model, CLEAR, False)
    layers = [f"blocks.{i}.attn.{part}" for i in (0, 1) for part in ("qkv", "out")]
    names = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert found.keys() == names | POOLING
    assert parameter_count(model) == 2 * 4 * (D * D + D) + 2 * 4
    assert {name for name, p in model.named_parameters() if p.requires_grad} == found.keys()


def test_a_network_without_attention_trains_all_or_nothing() -> None:
    model = ConvLSTM(ConvLSTMConfig())
    train_only(model, "all")
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ConfigError, match="a ConvLSTM has none"):
        train_only(model, "attention")


class Clips:
    """Eight clips of noise with a drift, without prompts."""

    def __len__(self) -> int:
        return 8

    def batch(self, indices: Tensor, chance: SampleRNG | None = None) -> tuple[Tensor, Cond]:
        drift = torch.linspace(-1, 1, 4)[:, None, None]
        made = [torch.randn(2, 4, 12, 20, generator=torch.Generator().manual_seed(int(i))) for i in indices]
        return torch.stack(made) / 3 + drift, Cond()


def settings(**changed: object) -> Settings:
    given = {
        "steps": 6,
        "batch": 4,
        "learning_rate": 3e-3,
        "trained": "attention",
        "averages": (Constant(0.0),),
    }
    return Settings(**{**given, "save_every": 3, "sheet_every": 0, **changed})  # type: ignore[arg-type]


def clip_student() -> VideoDiT:
    return small().adopt([replace(CYLINDER, pooled=2)])


def curve(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "losses.jsonl").read_text().splitlines()]


def test_a_student_comes_nearer_and_is_saved_with_what_it_learned(tmp_path: Path) -> None:
    objective = Denoising((PredictionDistillation(), AttentionDistillation(every=1)))
    student = train(clip_student(), Clips(), objective, settings(steps=40, save_every=0), tmp_path)
    terms = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    for name in ("PredictionDistillation", "AttentionDistillation"):
        first, last = (sum(line[name] for line in part) for part in (terms[:4], terms[-4:]))
        assert last < 0.7 * first, name
    before, after = clip_student().state_dict(), student.state_dict()
    learned = {name for name in before if not torch.equal(before[name], after[name])}
    assert learned == {
        n for n in before if ".attn.qkv." in n or ".attn.out." in n or n.startswith("learned.")
    }

    again = Model.load(tmp_path / "model")
    assert again.policies == (replace(CYLINDER, pooled=2),)
    assert all(torch.equal(value, after[name]) for name, value in again.state_dict().items())
    drawn = {"seeds": [0], "steps": 2, "guidance": 1.0, "policies": again.policies}
    images = generate(again, **drawn).samples
    assert torch.equal(images, generate(student, **drawn).samples)
    for part in again.learned["Neighbourhood"].values():
        nn.init.constant_(part.weight, 1 / 4)
    assert not torch.allclose(generate(again, **drawn).samples, images)
    with pytest.raises(
        ConfigError, match=r"takes weights '.*' of \[3, 3\], the model was trained with \[2, 2\]"
    ):
        generate(again, **{**drawn, "policies": replace(CYLINDER, pooled=3)})


def test_a_resumed_student_has_the_teacher_that_it_had(tmp_path: Path) -> None:
    train(clip_student(), Clips(), CLEAR, settings(), tmp_path / "whole")
    train(clip_student(), Clips(), CLEAR, settings(steps=3), tmp_path / "cut")
    train(clip_student(), Clips(), CLEAR, settings(), tmp_path / "cut", resume=True)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_what_cannot_be_trained_under_is_refused_before_the_first_step(tmp_path: Path) -> None:
    for pattern, error, line in (
        (Neighbourhood(span=4, block=8), NoEffectError, "would do nothing in training; visited 1.0; off"),
        (Neighbourhood(), ConfigError, "a clip of 4 frames, expected a picture"),
        (replace(CYLINDER, warmup=2), ConfigError, "warmup=2, expected fewer than total=1"),
    ):
        with pytest.raises(error) as caught:
            train(small().adopt([pattern]), Clips(), CLEAR, settings(), tmp_path / "run")
        assert line in str(caught.value)
    assert not (tmp_path / "run").exists()


class Blocks(Term):
    """Reads what no pattern says the order of."""

    weight = 1.0

    def taps(self, sites: Sequence[Site]) -> Sequence[str]:
        return ["blocks.1"]

    def loss(self, batch: Batch) -> Tensor:
        return batch.taps["blocks.1"].flatten(1).square().mean(1)


def test_rows_in_an_unknown_order_are_not_read() -> None:
    objective, model = Denoising((Blocks(),)), small()
    objective.check(model)
    objective.check(model.adopt([replace(CYLINDER, kernel="none")]))
    with pytest.raises(ConfigError, match=r"a term reads 'blocks.1', whose rows Neighbourhood.* reorders"):
        objective.check(model.adopt([CYLINDER]))


def test_what_a_policy_learned_goes_on_where_it_fits() -> None:
    model = clip_student()
    for part in model.learned["Neighbourhood"].values():
        nn.init.constant_(part.weight, 9.0)
    model.adopt([replace(CYLINDER, pooled=2, block=16, radius=2, kernel="auto")])
    assert all((part.weight == 9).all() for part in model.learned["Neighbourhood"].values())
    with pytest.raises(
        ConfigError, match=r"the model has learned '.*' of \(2, 2\), this setting has \(4, 4\)"
    ):
        model.adopt([replace(CYLINDER, pooled=4)])
    assert not model.adopt([]).learned


class Cylinder(Neighbourhood):
    """Not in a package where policies are looked for."""


class Homonym(Neighbourhood):
    """Found by its name, which is that of another."""


Homonym.__name__ = "Neighbourhood"


def test_a_policy_that_a_folder_could_not_name_is_refused_before_training() -> None:
    for kind, line in (
        (Cylinder, r"Cylinder\(.*could not be loaded with the model: unknown policy 'cylinder'"),
        (Homonym, r"is of test_distillation, its name is that of ditkit\.attention\.neighbourhood"),
    ):
        model = clip_student()
        with pytest.raises(ConfigError, match=line):
            model.adopt([kind()])
        assert model.policies == clip_student().policies and model.learned


def test_a_folder_names_policies_that_exist(tmp_path: Path) -> None:
    folder = DiT(DiTConfig(size=4, patch=2, channels=1, width=8, depth=1, heads=2)).save(tmp_path / "m")
    described = json.loads((folder / "config.json").read_text())
    assert "policies" not in described
    for policies, line in (
        (["neighbourhod:radius=2"], "unknown policy 'neighbourhod'"),
        (["neighbourhood:radius=none"], "radius='none', expected an integer"),
        ("neighbourhood", "'policies' should be a list of texts"),
        (["neighbourhood:pooled=2"], "missing tensor 'learned.Neighbourhood.blocks/0/attn/core.weight'"),
    ):
        (folder / "config.json").write_text(json.dumps({**described, "policies": policies}))
        with pytest.raises(CheckpointError) as caught:
            Model.load(folder)
        assert line in str(caught.value)
