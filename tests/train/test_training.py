"""The loop: what it learns, how it splits a batch, what it refuses and writes; and the recipes on top."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from ditkit.core.convention import DDPM, SIT, Convention
from ditkit.core.errors import ConfigError
from ditkit.core.model import parameter_count
from ditkit.data.images import ImageSet
from ditkit.models.dit import DiT, DiTConfig
from ditkit.recipes.emoji import emoji
from ditkit.recipes.fashion_dit import fashion_dit
from ditkit.tasks.image import recipe as class_image
from ditkit.tasks.recipe import describe, forward_macs, train_recipe
from ditkit.train.ema import Constant, Power
from ditkit.train.loop import train
from ditkit.train.randomness import SampleRNG, batch_indices, epoch_order
from ditkit.train.settings import Settings
from ditkit.train.timesteps import LogitNormal
from scripts.toy_run import DIFFUSION, FLOW, Pictures, losses, settings, toy_model, toy_run

SCRIPTS = Path(__file__).parents[1] / "support" / "scripts"


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    """20 steps in one process."""
    folder = tmp_path_factory.mktemp("single")
    toy_run(folder)
    return folder


def close(a: Path, b: Path, rtol: float) -> None:
    """Every loss and gradient norm of both runs, relatively."""
    one, two = losses(a), losses(b)
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for x, y in zip(one, two, strict=True):
        assert x == pytest.approx(y, rel=rtol)


def test_flow_matching_learns(tmp_path):
    given = settings(steps=120, batch=16, save_every=0)
    flow = replace(FLOW, timesteps=LogitNormal())
    model = train(toy_model(Convention()), Pictures(), flow, given, tmp_path)
    curve = [line["loss"] for line in losses(tmp_path)]
    assert sum(curve[-20:]) < 0.5 * sum(curve[:20])
    assert not model.training
    again = DiT.load(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_two_processes_give_the_losses_of_one(single, tmp_path):
    """torchrun, gloo; each process takes its half of the batch in two parts. Only sums change order."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    script = [str(SCRIPTS / "toy_run.py"), str(tmp_path), json.dumps({"accumulate": 2})]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(launch + script, capture_output=True, text=True, timeout=200, env=env, check=False)
    assert done.returncode == 0, done.stderr
    close(tmp_path, single, 1e-5)


def test_parts_of_a_batch_give_the_losses_of_the_whole(single, tmp_path):
    toy_run(tmp_path, accumulate=4)
    close(tmp_path, single, 1e-5)


def test_gradient_checkpointing_changes_nothing(single, tmp_path):
    toy_run(tmp_path, gradient_checkpointing=True)
    assert losses(tmp_path) == losses(single)


def test_bf16_stays_near_float32_and_keeps_its_weights_in_float32(single, tmp_path):
    model = toy_run(tmp_path, precision="bf16")
    close(tmp_path, single, 0.05)
    assert losses(tmp_path) != losses(single)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.slow
def test_compiled_network_learns_the_same(single, tmp_path):
    toy_run(tmp_path, compile=True)
    close(tmp_path, single, 1e-4)


def test_training_leaves_the_global_random_state_alone(tmp_path):
    before = torch.random.get_rng_state()
    toy_run(tmp_path, steps=4)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_labels_are_dropped_once_at_the_model_s_rate():
    """What the model is told is drawn by the loop; the network draws nothing of its own on top."""
    drop = torch.cat([SampleRNG(0, step, range(64)).draws((1,))[2] for step in range(50)])
    assert (drop < 0.1).float().mean().item() == pytest.approx(0.1, abs=0.02)
    model, seen = toy_model(label_dropout=0.5).train(), []
    model.label.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    data, told = Pictures().batch(torch.arange(8))
    model(data, torch.zeros(8), replace(told, drop=torch.arange(8) < 3))
    assert seen[0].tolist() == [4, 4, 4, 3, 0, 1, 2, 3]


def test_every_sample_is_visited_once_an_epoch():
    """Batches of 8 from 20 samples: epochs follow one another within a batch."""
    order = torch.cat([batch_indices(20, 8, 3, step) for step in range(5)])
    assert torch.equal(order[:20].sort().values, torch.arange(20))
    assert torch.equal(order[20:].sort().values, torch.arange(20))
    assert not torch.equal(order[:20], order[20:])
    assert torch.equal(order[:20], epoch_order(20, 3, 0))


def test_draws_belong_to_their_place():
    whole = SampleRNG(7, 11, range(6)).draws((2, 3))
    parts = [SampleRNG(7, 11, range(a, a + 2)).draws((2, 3)) for a in (0, 2, 4)]
    assert all(torch.equal(w, torch.cat(p)) for w, p in zip(whole, zip(*parts, strict=True), strict=True))
    assert not torch.equal(whole[0], SampleRNG(7, 12, range(6)).draws((2, 3))[0])
    assert not torch.equal(whole[0], SampleRNG(8, 11, range(6)).draws((2, 3))[0])


def test_learning_rate_rises_then_falls_as_the_inverse_root():
    given = Settings(steps=1000, learning_rate=1.0, warmup=10, decay_after=100)
    rates = [given.rate(step) for step in (0, 4, 9, 50, 100, 400)]
    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0, 0.5])
    assert Settings(learning_rate=0.5).rate(0) == 0.5


def test_learning_rate_falls_along_half_a_cosine():
    given = Settings(steps=110, learning_rate=1.0, warmup=10, cosine=True)
    rates = [given.rate(step) for step in (0, 9, 10, 35, 60, 110)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, (2 + 2**0.5) / 4, 0.5, 0.0])
    with pytest.raises(ConfigError, match="cosine and decay_after=5 both lower the learning rate"):
        Settings(cosine=True, decay_after=5)
    higher = replace(given, lowest=0.2)
    assert [higher.rate(step) for step in (10, 60, 110)] == pytest.approx([1.0, 0.6, 0.2])


def test_learning_rate_falls_in_a_line():
    """RAE's (arXiv 2510.11690): 2e-4 for 40 epochs of 800, then in a straight line to 2e-5."""
    given = Settings(steps=800, learning_rate=2e-4, linear_after=40, lowest=0.1)
    rates = [given.rate(step) for step in (0, 40, 420, 800)]
    assert rates == pytest.approx([2e-4, 2e-4, 1.1e-4, 2e-5])
    assert Settings(steps=10, linear_after=20).rate(9) == Settings(steps=10).rate(9)
    with pytest.raises(ConfigError, match="cosine and linear_after=5 both lower the learning rate"):
        Settings(cosine=True, linear_after=5)
    with pytest.raises(
        ConfigError, match=r"lowest=0.1 is where a fall ends, expected cosine or linear_after"
    ):
        Settings(lowest=0.1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "steps=0 should be at least 1"),
        ({"batch": -1}, "batch=-1 should be at least 1"),
        ({"accumulate": 0}, "accumulate=0 should be at least 1"),
        ({"warmup": 11, "steps": 10}, "warmup=11 is longer than steps=10"),
        ({"warmup": -1}, "warmup=-1 should be at least 0"),
        ({"batch": 10, "accumulate": 4}, "batch=10 does not divide into accumulate=4 parts"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 should be positive"),
        ({"learning_rate": float("nan")}, "learning_rate=nan should be positive and finite"),
        ({"clip": float("inf")}, "clip=inf should be at least 0 and finite"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 should be at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) should lie in \[0, 1\)"),
        ({"seed": -1}, "seed=-1 should be at least 0"),
        ({"save_every": -1}, "save_every=-1 should be at least 0"),
        ({"precision": "bf61"}, "unknown precision 'bf61'; did you mean 'bf16'"),
        ({"averages": ()}, "averages is empty"),
        ({"averages": (Power(0.1), Constant(), Power(0.1))}, "names one twice"),
    ],
)
def test_settings_out_of_range_are_refused(given, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Settings(**given)
    assert "\n" not in str(caught.value)


def test_batch_that_does_not_divide_among_processes_is_refused():
    assert Settings(batch=12, accumulate=2).share(3) == 2
    with pytest.raises(ConfigError, match=r"batch=12 does not divide among 8 processes x accumulate=2"):
        Settings(batch=12, accumulate=2).share(8)


def test_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write .*file/run/recipe.json: Not a directory"):
        toy_run(tmp_path / "file" / "run")


def test_objective_that_does_not_fit_leaves_no_folder(tmp_path):
    with pytest.raises(ConfigError, match="VariationalBound needs a learned variance"):
        train(toy_model(SIT), Pictures(), DIFFUSION, settings(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_launchers_that_shard_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda _: DistributedType.FSDP))
    with pytest.raises(ConfigError, match=r"FSDP is not supported \(choose from: NO, MULTI_CPU, MULTI_GPU\)"):
        toy_run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_losses(single):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(single / "tensorboard"))
    events.Reload()
    told = {e.step: e.value for e in events.Scalars("loss")}
    lines = losses(single)
    assert told == pytest.approx({line["step"]: line["loss"] for line in lines})
    assert set(events.Tags()["scalars"]) >= {"loss", "gradient_norm", "learning_rate", "samples_per_second"}
    rates = {e.step: e.value for e in events.Scalars("samples_per_second")}
    whole = [json.loads(line) for line in (single / "losses.jsonl").read_text().splitlines()]
    assert rates == pytest.approx({line["step"]: line["samples_per_second"] for line in whole}, abs=0.01)
    record = json.loads((single / "recipe.json").read_text())
    planned = Settings(
        **{name: record["settings"][name] for name in ("steps", "learning_rate", "warmup", "decay_after")}
    )
    found = {e.step: e.value for e in events.Scalars("learning_rate")}
    assert found == pytest.approx({line["step"]: planned.rate(line["step"] - 1) for line in lines})


def test_tensorboard_gets_each_term_once_and_the_sheets(tmp_path):
    """A loss of one term has the term's numbers; both would be two curves of the same."""
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def sheet(model, step):
        (tmp_path / "run" / "samples").mkdir(exist_ok=True)
        Image.new("RGB", (8, 6), (200, 30, 90)).save(tmp_path / "run" / "samples" / f"{step:06d}.png")

    train(toy_model(), Pictures(), FLOW, settings(steps=4, sheet_every=2), tmp_path / "run", sheet=sheet)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    values = {name: tuple(e.value for e in events.Scalars(name)) for name in events.Tags()["scalars"]}
    assert len(set(values.values())) == len(values)
    assert [(e.step, e.width, e.height) for e in events.Images("samples")] == [(2, 8, 6), (4, 8, 6)]


def test_progress_fits_a_terminal_of_80_columns(tmp_path):
    """On a terminal a bar with loss, images a second and time left, each frame on one line."""
    main, other = pty.openpty()
    script = [sys.executable, str(SCRIPTS / "toy_run.py"), str(tmp_path / "run"), json.dumps({"steps": 60})]
    env = os.environ | {"COLUMNS": "80", "LINES": "24", "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(script, stderr=other, stdout=subprocess.DEVNULL, env=env) as process:
        os.close(other)
        said = b""
        while chunk := _read(main):
            said += chunk
    assert process.returncode == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said.decode()).replace("\r", "\n")
    frames = [line for line in shown.split("\n") if "samples/s" in line]
    assert frames, shown
    assert re.search(r"60/60 +loss 0\.\d{4}  [\d,.]+ samples/s  0:00:00 left", frames[-1]), frames[-1]
    assert max(len(line) for line in frames) <= 80
    assert "…" not in shown


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux says so when the other end is closed
        return b""


@pytest.fixture
def little_set(monkeypatch) -> ImageSet:
    """12 pictures of 8 x 8 in three classes, under the name of a set."""
    g = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8, generator=g)
    names = tuple(map(str, range(12)))
    images = ImageSet("little", pictures, torch.arange(12) % 3, ("a", "b", "c"), names, names)
    monkeypatch.setattr(class_image, "load_images", lambda name, size: images)
    return images


def little_recipe() -> class_image.ClassImageRecipe:
    model = DiTConfig(size=8, patch=4, width=32, depth=1, heads=2, convention=DDPM)
    return replace(fashion_dit(), data="little", model=model, settings=settings(steps=3, warmup=0))


def test_recipe_takes_channels_and_classes_from_its_data(little_set, tmp_path):
    model = train_recipe(little_recipe(), tmp_path)
    assert (model.config.channels, model.config.classes, model.config.class_names) == (1, 3, ("a", "b", "c"))
    written = json.loads((tmp_path / "recipe.json").read_text())
    assert written["data"] == "little" and written["samples"] == 12
    assert [term["is"] for term in written["objective"]["terms"]] == ["Regression", "VariationalBound"]
    with pytest.raises(ConfigError, match=r"data was 'little', now 'other'"):
        train_recipe(replace(little_recipe(), data="other"), tmp_path, resume=True)


def test_recipe_describes_itself_and_trains_nothing(little_set, tmp_path):
    said = describe(little_recipe())
    for part in (
        r"data +little, 12 images \[1, 8, 8\], 3 classes, 0.0 MB in memory",
        r"model.classes +3\n",
        r"settings.learning_rate +0.002\n",
        r"objective.terms +\(Regression\(weight=1.0\), VariationalBound\(weight=1.0, on_given=False\)\)",
        rf"parameters +{parameter_count(DiT(little_recipe().fitting(little_set).model)):,}\n",
        r"length +3 steps x 8 = 2.0 epochs",
    ):
        assert re.search(part, said), (part, said)
    unfit = replace(little_recipe(), model=replace(little_recipe().model, convention=SIT))
    with pytest.raises(ConfigError, match="VariationalBound needs"):
        describe(unfit)


@pytest.mark.parametrize("recipe", [emoji(), fashion_dit()], ids=["emoji", "fashion-dit"])
def test_macs_counted_on_meta_are_those_of_the_closed_form(recipe):
    """DiT's 12 N d^2 + 2 N^2 d + 6 d^2 a block, and the small rest."""
    c = recipe.model
    tokens, d, pixels = (c.size // c.patch) ** 2, c.width, c.patch**2 * c.channels
    out = pixels * (1 if c.convention.extra == "none" else 2)
    block = 12 * tokens * d**2 + 2 * tokens**2 * d + 6 * d**2
    rest = tokens * pixels * d + 256 * d + d**2 + 2 * d**2 + tokens * d * out
    assert forward_macs(recipe) == c.depth * block + rest
