"""Task routing: the bypass, the clock of every path, the control, and what a trained model cannot do without."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import ditkit
from cli_support import save_photos
from ditkit.adapt import TaskRouting
from ditkit.adapt.task_routing import routed
from ditkit.attention import Neighbourhood
from ditkit.bench.paired import Draws, paired_loss
from ditkit.caching import TaylorSeer
from ditkit.cli.main import main
from ditkit.core.cond import Cond
from ditkit.core.convention import DDPM
from ditkit.core.errors import ConfigError
from ditkit.core.model import Model
from ditkit.core.path import PATHS
from ditkit.core.trajectory import Trajectory
from ditkit.hosts.hosted import Host, trained_under
from ditkit.hosts.streams import Streams
from ditkit.nn.task_windows import offsets, windows
from ditkit.recipes.dtr import dtr_uw
from ditkit.sample import Autoguidance, sample
from ditkit.sample.inversion import invert
from ditkit.tasks.recipe import describe
from ditkit.train.denoising import Denoising, NoisyBatch
from ditkit.train.loop import Training, train
from ditkit.train.settings import Group
from ditkit.train.taps import run_with_taps
from ditkit.train.terms.p2 import P2
from ditkit.train.terms.uncertainty import RATE, UncertaintyWeighting
from ditkit.train.timesteps import Shifted, Stratified
from family_pipelines_support import dit as dit_pipeline
from rig import noise, tiny_dit

sys.path.insert(0, str(Path(__file__).parents[1] / "support" / "scripts"))
from toy_run import Pictures, settings, toy_model

T = torch.tensor([0.3, 0.95])
LINEAR = TaskRouting(path="linear")
"""Of the path of `tiny_dit`."""
COND = Cond(label=torch.tensor([0, 2]))
SHORT = ["--steps", "2", "--batch", "8", "--warmup", "0", "--precision", "float32", "--sheet-every", "0"]


def out(policy: TaskRouting | None, x: Tensor | None = None, t: Tensor = T, cond: Cond = COND) -> Tensor:
    model = tiny_dit().adopt([] if policy is None else [policy])
    x = noise() if x is None else x
    found: Tensor = run_with_taps(model, model, (), (3, 8, 8), x, t, cond, times=t).out
    return found


def test_all_channels_shared_is_the_plain_model_to_the_bit():
    plain = out(None)
    assert torch.equal(out(TaskRouting(share=1.0)), plain)
    assert not torch.equal(out(LINEAR), plain)


def test_windows_overlap_as_their_offsets_say():
    first, rows = (f(torch.arange(1000), 384, 0.8, 4.0) for f in (offsets, windows))
    assert first[0] == 0 and first[-1] == 77 and (first.diff() >= 0).all()
    for a, b in ((0, 999), (500, 750), (900, 901)):
        assert int((rows[a] & rows[b]).sum()) == 307 - abs(int(first[a] - first[b]))


def test_inactive_channels_bypass_the_block_and_are_written_to():
    """The gradient with respect to them is the identity: no path leads through attention or MLP."""
    model, c = tiny_dit(), torch.randn(2, 32)
    mask = partial(TaskRouting().mask, torch.tensor([200, 999]), name="blocks.0")
    rows = mask(channels=32)
    x = torch.randn(2, 16, 32, requires_grad=True)
    result = routed(mask, model.blocks[0], x, c)
    assert (result - x).abs().min() > 0
    weight = torch.randn_like(result)
    (gradient,) = torch.autograd.grad((result * weight).sum(), x)
    inactive = ~rows[:, None].expand_as(x)
    assert torch.equal(gradient[inactive], weight[inactive])
    assert (gradient != weight)[~inactive].all()
    with torch.no_grad():
        model.blocks[0].modulation.weight.zero_()
        model.blocks[0].modulation.bias.zero_()
    assert torch.equal(routed(mask, model.blocks[0], x, c), x)


def test_a_sample_has_its_own_window():
    for policy in (LINEAR, replace(LINEAR, routes="random")):
        both = out(policy)
        for i in range(2):
            alone = out(policy, noise()[i : i + 1], T[i : i + 1], Cond(label=COND.label[i : i + 1]))
            assert torch.allclose(both[i], alone[0], atol=1e-5)


@pytest.mark.parametrize("path", ["ddpm", *PATHS])
def test_the_last_task_is_the_noisiest_on_every_path(path):
    task = TaskRouting(path=path).tasks(torch.linspace(0.001, 1, 50))
    assert task[0] == 0 and task[-1] > 990 and (task.diff() >= 0).all()  # the path vp keeps some signal
    if path == "ddpm":
        assert torch.equal(TaskRouting().tasks((torch.arange(1000) + 1) / 1000), torch.arange(1000))


def test_the_control_is_another_draw_in_every_block_and_task():
    policy, task = TaskRouting(routes="random"), torch.tensor([1, 2])
    one, other = (policy.mask(task, 32, name) for name in ("blocks.0", "blocks.1"))
    assert (one.sum(1) == 25).all() and (one[0] != one[1]).any() and (one != other).any()
    assert torch.equal(policy.mask(task, 32, "blocks.0"), one)


def test_two_streams_have_windows_of_their_own_width():
    mask = partial(TaskRouting().mask, torch.tensor([999]), name="b")
    x = Streams(torch.ones(1, 3, 20), torch.ones(1, 2, 10))
    found: Any = routed(mask, lambda s: s, x)
    assert torch.equal(found.image, x.image) and torch.equal(found.text, x.text)
    masked: Any = routed(mask, lambda s: Streams(*(0 * h for h in s)), x)
    assert masked.image[0, 0].tolist() == [1.0] * 4 + [0.0] * 16
    assert masked.text[0, 0].tolist() == [1.0] * 2 + [0.0] * 8


def test_a_model_trained_so_is_sampled_so_unless_it_is_named(tmp_path):
    model: Model = ditkit.load(tiny_dit().adopt([LINEAR]).save(tmp_path))

    def drawn(*policies: Any) -> Tensor:
        found: Tensor = ditkit.generate(model, [0, 1], seeds=(0, 1), steps=6, policies=policies).samples
        return found

    own, plain = drawn(), drawn(TaskRouting(share=1.0))
    assert torch.equal(own, drawn(LINEAR)) and not torch.equal(own, plain)
    cache, pattern = TaylorSeer(interval=3, order=1), Neighbourhood(radius=2, block=8, kernel="cpu")
    assert not torch.equal(drawn(cache), own) and drawn(cache, pattern).isfinite().all()


def test_masks_by_time_of_another_path_are_refused_before_anything_runs(tmp_path):
    """The default is of DDPM's path; every entrance says so in one line, and the neutral setting is of any."""
    lines = []
    for refused in (
        lambda: tiny_dit().adopt([TaskRouting()]),
        lambda: ditkit.generate(tiny_dit(), [0], seeds=[0], steps=2, policies=[TaskRouting()]),
        lambda: ditkit.compare(tiny_dit(), seeds=[0], steps=2, policies=[TaskRouting()], memory=False),
        lambda: invert(tiny_dit(), noise(), COND, steps=2, policies=[TaskRouting()]),
    ):
        with pytest.raises(ConfigError, match="path='ddpm', and the model is of path 'linear'") as caught:
            refused()
        lines.append(str(caught.value))
    assert lines[0].endswith("expected taskrouting:path=linear") and "\n" not in "".join(lines)
    tiny_dit().adopt([TaskRouting(share=1.0)])
    folder = tiny_dit().adopt([LINEAR]).save(tmp_path)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("path=linear", "path=cosine"))
    with pytest.raises(ConfigError, match="path='cosine', and the model is of path 'linear'"):
        ditkit.load(folder)


def test_every_entrance_runs_under_what_the_model_was_trained_under():
    """Sampling, inversion, a guide, a teacher and the judge of losses all have it without being asked."""
    model, plain = tiny_dit().adopt([LINEAR]), tiny_dit()
    for run in (
        lambda m: ditkit.generate(m, [0], seeds=[0], steps=2, guidance=2.0).samples,
        lambda m: sample(plain, COND, [0, 1], steps=2, guidance=Autoguidance(2.0, m)).samples,
        lambda m: invert(m, noise(), COND, steps=2),
        lambda m: paired_loss({"arm": m}, Four(), Draws(count=16)).losses["arm"],
    ):
        own, without = run(model), run(plain)
        assert own.isfinite().all() and not torch.allclose(own, without, atol=1e-4)
        named = tiny_dit().adopt([LINEAR])
        assert torch.equal(run(named), own)


class Four:
    """Held-out pictures of the four classes."""

    def __len__(self) -> int:
        return 16

    def batch(self, indices: Tensor, rng: Any) -> tuple[Tensor, Cond]:
        return noise(16, seed=3)[indices], Cond(label=indices % 4)


def test_losses_are_judged_at_the_masks_of_their_own_times():
    """The judge's losses are training's at the same draws: a mask of another time would give others."""
    model, draws = tiny_dit().adopt([LINEAR]), Draws(count=16)
    judged = paired_loss({"arm": model}, Four(), draws).losses["arm"]
    (batch,) = draws.batches(Four(), 16)
    path = model.config.convention.make_path()
    found = Denoising().at(
        model, model, path=path, data=batch.data, noise=batch.noise, t=batch.t, cond=batch.cond
    )
    assert judged.mean().item() == pytest.approx(found["loss"].item(), rel=1e-6)


def test_a_batch_that_the_clusters_do_not_divide_is_refused_before_the_first_step(tmp_path):
    uncertain = Denoising((UncertaintyWeighting(),), clock=Stratified(8))
    run = partial(train, toy_model(), Pictures())
    with pytest.raises(ConfigError, match=r"batch=12 does not divide into strata=8 \(remainder 4\)"):
        run(uncertain, settings(batch=12), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"of 8 parts of noise-time; got Independent\(\) of Uniform"):
        run(Denoising((UncertaintyWeighting(),)), settings(), tmp_path / "b")
    shifted = replace(uncertain, timesteps=Shifted(3.0))
    with pytest.raises(ConfigError, match=r"Shifted.*expected Stratified\(strata=8\) of Uniform"):
        run(shifted, settings(), tmp_path / "c")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="batch=63 does not divide into strata=8"):
        describe(
            replace(dtr_uw(), data=str(pictures(tmp_path)), settings=replace(dtr_uw().settings, batch=63))
        )


def pictures(folder: Path) -> Path:
    """Write two pictures of two classes."""
    for name in ("a", "b"):
        (folder / name).mkdir()
        Image.new("L", (32, 32)).save(folder / name / "0.png")
    return folder


def test_uncertainties_learn_at_their_own_rate_and_are_resumed(tmp_path):
    """s_i goes down where a cluster's loss is small; the published losses are in tests/golden."""
    objective = Denoising((UncertaintyWeighting(),), clock=Stratified(8))
    changed = {"warmup": 0, "groups": (Group("uncertaintyweighting", RATE / 2e-3),), "clip": 0.0}

    def run(name: str, steps: int, resume: bool = False) -> dict[str, Tensor]:
        train(
            toy_model().adopt([TaskRouting()]), Pictures(), objective, settings(steps=steps, **changed),
            tmp_path / name, resume=resume,
        )  # fmt: skip
        return load_file(tmp_path / name / "state.safetensors")

    whole = run("whole", 4)
    s = whole["part.UncertaintyWeighting.s"]
    assert s.shape == (8,) and s.abs().max().item() == pytest.approx(4 * RATE, rel=0.1)
    with pytest.raises(KeyboardInterrupt):
        interrupted(partial(run, "cut", 4), after=2)
    cut = run("cut", 4, resume=True)
    assert whole.keys() == cut.keys() and all(torch.equal(whole[k], cut[k]) for k in whole)


def interrupted(run: Any, after: int) -> None:
    """Stop a training after a number of steps."""
    step, done = Training.step, [0]

    def counted(self: Training) -> Any:
        if done[0] == after:
            raise KeyboardInterrupt
        done[0] += 1
        return step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "step", counted)
        run()


def test_p2_is_the_error_over_signal_to_noise():
    data, eps = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    path, t = DDPM.make_path(), torch.tensor([3, 500, 990])
    batch = NoisyBatch(
        path=path, convention=DDPM, data=data, noise=eps, x=path.mix(data, eps, t.double()), t=t,
        prediction=torch.zeros_like(data), fraction=None, taps={},
    )  # fmt: skip
    for k, gamma in ((1.0, 1.0), (0.5, 0.5)):
        found = P2(k=k, gamma=gamma).loss(batch)
        for i, index in enumerate(t.tolist()):
            ratio = float(path.abar[index] / (1 - path.abar[index]))
            assert found[i].item() == pytest.approx(eps[i].square().mean().item() / (k + ratio) ** gamma)
    with pytest.raises(ConfigError, match="P2 needs a prediction of noise; the model predicts velocity"):
        Denoising((P2(),)).check(tiny_dit())


def test_a_transformer_of_diffusers_is_accelerated_under_its_routing(tmp_path):
    """Its tasks are the scheduler's indices; without, it runs only where the neutral setting is named."""
    pipe, told = dit_pipeline()
    pipe.set_progress_bar_config(disable=True)
    net = Host.around(pipe.transformer.eval()).adopt([TaskRouting()])
    tasks: list[int] = []

    def drawn(*policies: Any) -> Tensor:
        fast = ditkit.accelerate(pipe, *policies)
        with fast:
            given = {**told, "num_inference_steps": 6, "generator": torch.Generator().manual_seed(0)}
            out = fast(**given, return_dict=False)[0]
            rows.append([type(receipt.policy).__name__ for receipt in fast.report().cost.receipts])
        return torch.as_tensor(out)

    rows: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        own = TaskRouting.tasks
        patch.setattr(TaskRouting, "tasks", lambda p, t: tasks.extend(own(p, t).tolist()) or own(p, t))
        cached = drawn(TaylorSeer(interval=2, order=1))
    assert tasks[::4] == pipe.scheduler.timesteps.tolist(), "both lanes of two samples"
    assert rows[-1] == ["TaskRouting", "TaylorSeer"]
    named = drawn(TaylorSeer(interval=2, order=1), TaskRouting())
    without = drawn(TaylorSeer(interval=2, order=1), TaskRouting(share=1.0))
    assert torch.equal(cached, named) and not torch.allclose(cached, without, atol=1e-4)
    neutral = ditkit.accelerate(pipe, TaylorSeer(interval=1))
    with neutral:
        neutral(**told, num_inference_steps=3, generator=torch.Generator().manual_seed(0))
        assert neutral.report(exact=True).rows[1].identical, "what it is compared with is routed, too"
    with pytest.raises(ConfigError, match="was trained under TaskRouting"):
        net.transformer.save_pretrained(tmp_path / "plain")
    loaded = ditkit.load(net.save(tmp_path / "ours"))
    assert loaded.policies == (TaskRouting(),) and trained_under(loaded.transformer) == (TaskRouting(),)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"times \[2, 4\], expected one a sample"):
        TaskRouting().tasks(torch.zeros(2, 4))
    with pytest.raises(ConfigError, match="TaskRouting: share=0"):
        TaskRouting(share=0.0)
    with pytest.raises(ConfigError, match="routes"):
        TaskRouting(routes="window")  # type: ignore[arg-type]
    assert Trajectory(tiny_dit().sites(), [TaskRouting()], 1).claims[0]["blocks.2"] == "wrap"


def test_the_recipes_from_the_command_line_to_a_picture(tmp_path, capsys):
    photos, out = save_photos(tmp_path / "photos"), tmp_path / "run"
    sizes = ["--size", "8", "--width", "16", "--depth", "2", "--heads", "2", "--patch", "2"]
    words = ["train", "dtr-uw", "--data", str(photos), "--out", str(out), *sizes, *SHORT]
    assert main([*words, "--batch", "12"]) == 2
    assert "batch=12 does not divide into strata=8" in capsys.readouterr().err
    assert main([*words, "--policy", "taskrouting:path=linear"]) == 2
    assert "the model is of path 'ddpm', whose noise-times are other tasks" in capsys.readouterr().err
    assert not list(tmp_path.glob("run/*")) and main(words) == 0
    drawn = ["generate", str(out / "model"), "--label", "cat", "--seeds", "0", "--steps", "3"]
    assert main([*drawn, "--out", str(tmp_path / "drawn")]) == 0
    assert list((tmp_path / "drawn").glob("*.png"))
