"""Training that goes on from a trained model: its sizes, its weights, policies, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_cli_latent import QUICK, TINY, said

import ditkit
from cli_support import Capture, complaint, exit_code
from ditkit.attention.neighbourhood import Neighbourhood
from ditkit.core.convention import Convention
from ditkit.core.errors import ConfigError
from ditkit.data.sets import moving_digits
from ditkit.models.video_dit import VideoDiT, VideoDiTConfig
from ditkit.recipes.clear_video_dit import clear_video_dit
from ditkit.recipes.image_vae import image_vae
from ditkit.report.sheet import write_png
from ditkit.tasks.recipe import describe, forward_macs, train_recipe
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Constant

CLIP = VideoDiTConfig(
    frames=4,
    size=(16, 16),
    patch=(1, 4, 4),
    channels=1,
    width=24,
    depth=2,
    heads=2,
    convention=Convention(prediction="data"),
)
CYLINDER = Neighbourhood(radius=2, pooled=2, span=2, block=8, kernel="cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(8):
        place = folder / ("warm" if i % 2 else "cold") / f"{i}.png"
        write_png(place, torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i)))
    return folder


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small DiT that has learned these pictures for two steps."""
    run = tmp_path_factory.mktemp("run")
    words = ["emoji", "--data", pictures, "--size", "16", "--patch", "2", "--steps", "2", *TINY]
    assert exit_code("train", *words, "--out", run) == 0
    return run / "model"


@pytest.fixture
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of clips in which squares stand for the handwritten digits."""
    squares = torch.zeros(10, 28, 28, dtype=torch.uint8)
    squares[:, 6:22, 6:22] = 255
    monkeypatch.setattr(moving_digits, "read_digits", lambda split: squares)
    model = VideoDiT(CLIP)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=torch.Generator().manual_seed(0))
    return model.save(tmp_path / "clips")


def test_sizes_and_weights_are_those_of_the_model(
    trained: Path, pictures: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = ["train", "emoji", "--init", trained, "--data", pictures, "--steps", "1", *QUICK]
    assert f"init                             {trained}" in said(capsys, *words, "--dry-run")
    said(capsys, *words, "--sheet-every", "0", "--learning-rate", "1e-12", "--out", tmp_path)
    before, after = ditkit.load(trained), ditkit.load(tmp_path / "model")
    assert after.config == before.config
    for name, value in after.state_dict().items():
        assert torch.allclose(value, before.state_dict()[name], atol=1e-9)
    assert json.loads((tmp_path / "recipe.json").read_text())["init"]["folder"] == str(trained)


def test_a_model_is_trained_under_a_policy_and_keeps_its_name(
    trained: Path, pictures: Path, tmp_path: Path, capsys: Capture
) -> None:
    policy = "neighbourhood:block=8,kernel=cpu,pooled=2,radius=2"
    words = ["train", "emoji", "--init", trained, "--data", pictures, "--steps", "1", *QUICK]
    said(capsys, *words, "--policy", policy, "--sheet-every", "0", "--out", tmp_path)
    model = ditkit.load(tmp_path / "model")
    assert model.policies == (Neighbourhood(block=8, kernel="cpu", pooled=2, radius=2),)
    (pooling,) = model.learned["Neighbourhood"].values()
    assert not torch.equal(pooling.weight, torch.full((2, 2), 0.25))


def test_clear_on_clips(clips: Path, tmp_path: Path) -> None:
    recipe = clear_video_dit()
    short = replace(recipe.settings, steps=2, batch=2, warmup=0, sheet_every=0, save_every=1)
    recipe = replace(recipe, init=str(clips), policies=(CYLINDER,), settings=short)
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in describe(recipe).splitlines())
    assert lines["policies"] == "neighbourhood:block=8,kernel=cpu,radius=2,pooled=2,span=2"
    trained, forward = 2 * 4 * (24 * 24 + 24) + 2 * 4, forward_macs(replace(recipe, model=CLIP))
    assert lines["trained parameters"] == f"{trained:,}"
    training = f"{4 * forward:,} in training, without policies"  # the teacher's forward is the fourth
    assert lines["MACs of a sample"] == f"{forward:,} forward, {training}"
    model = train_recipe(recipe, tmp_path / "run")
    assert model.policies == (CYLINDER,) and ditkit.load(tmp_path / "run" / "model").policies == (CYLINDER,)
    state = load_file(tmp_path / "run" / "state.safetensors")
    disk = sum(tensor.nbytes for name, tensor in state.items() if not name.startswith("optimizer.step."))
    whole = sum(p.nbytes for p in model.parameters())
    memory = disk + whole + whole  # frozen weights and gradients of the others, then the teacher
    held = f"{disk / 1e6:.1f} MB on disk, {memory / 1e6:.1f} MB in memory with gradients and the teacher"
    assert lines["state"] == held

    again = replace(recipe, init=str(VideoDiT(CLIP).save(tmp_path / "other")))
    with pytest.raises(ConfigError, match=r"init\.folder was"):
        train_recipe(again, tmp_path / "run", resume=True)


def test_a_given_policy_takes_the_place_of_the_recipe_s(clips: Path, capsys: Capture) -> None:
    words = ["train", "clear-video-dit", "--init", clips, "--dry-run"]
    policy = "neighbourhood:block=8,kernel=cpu,radius=2,span=1"
    assert f"policies                         {policy}" in said(capsys, *words, "--policy", policy)
    assert "policies" not in said(capsys, *words, "--policy", "exact")
    assert "pooled=4, span=16" in complaint(capsys, *words)  # the recipe's own is not for 64 tokens


def test_a_student_goes_on_with_the_weights_that_its_policies_learned(clips: Path, tmp_path: Path) -> None:
    model = VideoDiT(CLIP).adopt([CYLINDER])
    for part in model.learned["Neighbourhood"].values():
        torch.nn.init.normal_(part.weight)
    recipe = clear_video_dit()
    still = replace(
        recipe.settings, steps=1, batch=1, warmup=0, sheet_every=0, save_every=0, learning_rate=1e-12
    )
    start = str(model.save(tmp_path / "student"))
    trained = train_recipe(
        replace(recipe, init=start, policies=(CYLINDER,), settings=still), tmp_path / "run"
    )
    for name, value in trained.learned.state_dict().items():
        assert torch.allclose(value, model.learned.state_dict()[name], atol=1e-6)


def test_a_student_is_not_trained_without_its_policies_unasked(
    clips: Path, tmp_path: Path, capsys: Capture
) -> None:
    student = VideoDiT(CLIP).adopt([CYLINDER]).save(tmp_path / "student")
    words = ["train", "video-dit", "--init", student, "--dry-run"]
    neutral = "neighbourhood:block=8,kernel=none,radius=2,pooled=2,span=2"
    line = f"got no policies, expected some, if only {neutral}"
    assert line in complaint(capsys, *words) and line in complaint(capsys, *words, "--policy", "exact")
    assert neutral in said(capsys, *words, "--policy", neutral)


def test_a_resume_goes_on_from_the_same_model_under_the_same_policies(clips: Path, tmp_path: Path) -> None:
    like = clear_video_dit()
    short = replace(
        like.settings, steps=1, batch=1, warmup=0, sheet_every=0, save_every=1, averages=(Constant(0.0),)
    )
    dense = replace(like, model=CLIP, objective=Denoising(), settings=short, policies=())
    sparse = replace(dense, policies=(CYLINDER,))
    for before, after, line in (
        (dense, sparse, r"policies was \[\], now \['neighb.*; a resume needs the same"),
        (sparse, dense, r"policies was \['neighb.*, now \[\]"),
        (dense, replace(dense, init=str(clips)), r"init\.folder was '', now"),
    ):
        run = tmp_path / str(len(list(tmp_path.iterdir())))
        train_recipe(before, run)
        with pytest.raises(ConfigError, match=line):
            train_recipe(after, run, resume=True)
    described = json.loads((run / "recipe.json").read_text())
    older = {key: value for key, value in described.items() if key not in ("policies", "init")}
    (run / "recipe.json").write_text(json.dumps(older))
    train_recipe(dense, run, resume=True)
    assert json.loads((run / "recipe.json").read_text()) == described


def test_what_does_not_fit_is_refused(
    trained: Path, clips: Path, pictures: Path, tmp_path: Path, capsys: Capture
) -> None:
    few = tmp_path / "few"
    write_png(few / "cold" / "0.png", torch.rand(3, 16, 16))
    out = ("--out", tmp_path / "run")
    for words, line in (
        (
            ["clear-video-dit"],
            "PredictionDistillation compares with the trained model that it goes on from; expected init",
        ),
        (["clear-video-dit", "--init", trained], "is a DiT, expected a VideoDiT"),
        (["emoji", "--init", tmp_path / "none", "--data", pictures], "there is no folder of that name"),
        (["emoji", "--init", trained, "--data", pictures, "--width", "32"], "--width with --init"),
        (["emoji", "--init", trained, "--data", few], "has classes=2, the data need 1"),
        (["emoji", "--data", pictures, "--policy", "neighbourhod"], "unknown policy 'neighbourhod'"),
        (["image-vae", "--init", trained], "trains no model with sites"),
    ):
        for more in ([], ["--dry-run"]):
            assert line in complaint(capsys, "train", *words, *out, *more)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"policies=.*trains no model with sites, expected none"):
        replace(image_vae(), policies=(CYLINDER,))


def test_what_a_policy_learns_has_the_type_of_the_model() -> None:
    model = VideoDiT(CLIP).half().adopt([CYLINDER])
    assert {p.dtype for p in model.parameters()} == {torch.float16}
