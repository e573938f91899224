"""The harness of `benchmarks/video_masks.py`: its ball, what it measures, its control, and trainings that go on."""

from __future__ import annotations

import json
import math
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool3d

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import common
import video_masks
from bouncing_ball import BouncingBall, Exam, Track, centres, velocity_error
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.data.clips import ClipSet
from ditkit.metrics.perceptual import ClipFeature
from ditkit.models.vdt import VDT
from ditkit.sample.noise import initial_noise
from ditkit.tasks.video.masks import mask_kind
from ditkit.tasks.video.recipe import MaskedClipDataset, conditioned
from ditkit.train.log import LOSSES
from models_support import perturbed
from replacement import Replacement
from video_masks import CLAIMS, COLUMNS, REPLACED, TASKS, TRUTH, VARIANTS, WITHOUT_NETWORK, Arguments

TINY = replace(video_masks.NETWORK, width=16, depth=1, heads=2)
MANY = torch.arange(64)


@pytest.fixture(scope="module")
def balls() -> BouncingBall:
    return BouncingBall(length=64)


@pytest.fixture(scope="module")
def model() -> VDT:
    torch.manual_seed(0)
    return perturbed(VDT(TINY), 0.3).requires_grad_(False)


def test_a_ball_turns_round_where_it_touches_a_wall(balls: BouncingBall) -> None:
    """Against small steps: one that would leave the frame turns round, by itself along each axis."""
    parts = 10
    low, high = balls.radius, balls.side - balls.radius
    track = balls.track(MANY)
    for place, walls in zip(track.centres[:8].double(), track.walls[:8], strict=True):
        free = (
            (walls.diff(dim=0) == 0).all(1).nonzero().flatten()[0]
        )  # a step without a bounce has the velocity
        velocity = (place[free + 1] - place[free]) * (-1.0) ** walls[free]
        ball, bounces = place[0].clone(), torch.zeros(2, dtype=torch.long)
        for frame in range(1, balls.frames):
            for _ in range(parts):
                ball += velocity / parts
                hit = (ball < low) | (ball > high)
                ball = torch.where(ball < low, 2 * low - ball, ball)
                ball = torch.where(ball > high, 2 * high - ball, ball)
                velocity = torch.where(hit, -velocity, velocity)
                bounces += hit
            torch.testing.assert_close(ball, place[frame], atol=1e-4, rtol=0)
            assert torch.equal(bounces, walls[frame].abs())


def test_speed_is_kept_and_lies_in_the_range(balls: BouncingBall) -> None:
    track = balls.track(MANY)
    steps, free = track.centres.diff(dim=1).norm(dim=-1), (track.walls.diff(dim=1) == 0).all(-1)
    for own, counts in zip(steps, free, strict=True):
        assert own[counts].std() < 1e-5 and 1 <= own[counts].mean() <= 2
        assert (own <= own[counts].mean() + 1e-5).all()
    assert (~free).any(1).all()


def test_clips_are_discs_at_known_places(balls: BouncingBall) -> None:
    clips, track = balls.clips(MANY), balls.track(MANY)
    assert isinstance(balls, ClipSet) and clips.shape == (64, 1, 16, 16, 16)
    assert clips.min() == -1 and clips.max() == 1
    area = ((clips + 1) / 2).sum((1, 3, 4))
    assert (area / (math.pi * balls.radius**2) - 1).abs().max() < 0.05
    assert (centres(clips) - track.centres).norm(dim=-1).max() < 0.06


def test_a_clip_belongs_to_its_seed_and_number(balls: BouncingBall) -> None:
    clips = balls.clips(MANY)
    assert torch.equal(balls.clips(torch.tensor([9, 3])), clips[[9, 3]])
    assert not torch.equal(replace(balls, seed=1).clips(MANY[:1]), clips[:1])
    assert len(clips.flatten(1).unique(dim=0)) == len(clips)
    assert torch.equal(replace(balls, frames=4).clips(MANY), clips[:, :, :4])
    with pytest.raises(ConfigError, match="64"):
        balls.clips(torch.tensor([64]))


def test_the_centre_of_a_black_frame_is_its_middle() -> None:
    middle = centres(torch.full((1, 1, 2, 16, 10), -1.0))
    torch.testing.assert_close(middle, torch.tensor([8.0, 5.0]).expand(1, 2, 2))


def along(rows: list[float], walls: list[int]) -> Track:
    """A ball that moves along one axis."""
    centre, bounces = torch.tensor(rows), torch.tensor(walls)
    return Track(*(torch.stack([x, torch.zeros_like(x)], -1)[None] for x in (centre, bounces)))


def test_velocity_after_a_bounce_is_that_of_its_reflection(balls: BouncingBall) -> None:
    """A ball at 2 px a frame meets the wall at 14 after the third frame; two steps follow it without a bounce."""
    truth = along([9.0, 11.0, 13.0, 13.0, 11.0, 9.0], [0, 0, 0, 1, 1, 1])
    assert velocity_error(truth.centres, truth, given=2) == 0
    through = along([9.0, 11.0, 13.0, 15.0, 17.0, 19.0], [0] * 6).centres
    still = along([9.0, 11.0, 11.0, 11.0, 11.0, 11.0], [0] * 6).centres
    slow = along([9.0, 11.0, 13.0, 13.0, 12.0, 11.0], [0] * 6).centres
    late = along([9.0, 11.0, 13.0, 13.0, 15.0, 13.0], [0] * 6).centres
    errors = [velocity_error(found, truth, given=2) for found in (through, still, slow, late)]
    assert errors == [4, 2, 1, 2]
    assert math.isnan(velocity_error(truth.centres, truth, given=4))  # the bounce was given


def test_what_is_wrong_elsewhere_does_not_count(balls: BouncingBall) -> None:
    """Neither a shift of all frames, nor given frames, nor steps before the bounce or in which one happens."""
    truth = balls.track(MANY)
    assert velocity_error(truth.centres, truth, given=8) == 0
    assert velocity_error(truth.centres + 3, truth, given=8) == pytest.approx(0, abs=1e-5)
    counted = set()
    for step in range(15):
        moved = truth.centres.clone()
        moved[:, step + 1 :, 0] += 1
        for ball in range(8):
            own = Track(*(part[ball : ball + 1] for part in truth))
            if velocity_error(moved[ball : ball + 1], own, given=8) > 0:
                counted.add((ball, step))
    walls = truth.walls
    assert counted == {
        (ball, step)
        for ball in range(8)
        for step in range(8, 15)
        if not torch.equal(walls[ball, step], walls[ball, 7])
        and torch.equal(walls[ball, step], walls[ball, step + 1])
    }
    assert counted


@pytest.mark.parametrize("kind", ["predict", "interpolate", "region"])
@pytest.mark.parametrize("fresh", [False, True])
def test_replacement_keeps_what_is_given(fresh: bool, kind: str, model: VDT, balls: BouncingBall) -> None:
    clips = balls.clips(MANY[:2])
    cond = conditioned(clips, mask_kind(kind), [0, 1])
    assert cond.mask is not None
    given = ~cond.mask
    made = video_masks.replaced(model, 4, fresh, cond)
    assert given.any() and torch.equal(made[given], clips[given])
    blind = video_masks.drawn_by(model, 4, 2)
    assert not torch.allclose(made[cond.mask], blind[cond.mask], atol=1e-3)  # it saw what was given


@pytest.mark.parametrize("fresh", [False, True])
def test_replacement_shows_what_is_given_as_noisy_as_the_rest(fresh: bool, balls: BouncingBall) -> None:
    """At each step (1 - t) context + t noise, the noise that of the seed, or the next draws of its generator."""
    seen: list[tuple[float, Tensor]] = []

    class Watched(VDT):
        def forward(self, x: Tensor, t: Tensor, cond: Cond, *run: Any) -> Tensor:
            seen.append((float(t[0]), x))
            assert cond.mask is None and cond.context is None
            return super().forward(x, t, cond, *run)

    clips, cond = balls.clips(MANY[:2]), conditioned(balls.clips(MANY[:2]), mask_kind("predict"), [0, 1])
    video_masks.replaced(Watched(TINY).eval(), 3, fresh, cond)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    draws = [torch.stack([torch.randn(1, 16, 16, 16, generator=g) for g in generators]) for _ in range(3)]
    assert torch.equal(draws[0], initial_noise((1, 16, 16, 16), [0, 1]))
    assert [t for t, _ in seen] == pytest.approx([1, 2 / 3, 1 / 3])
    for (t, x), draw in zip(seen, draws if fresh else draws[:1] * 3, strict=True):
        noised = (1 - t) * clips + t * draw
        torch.testing.assert_close(x[:, :, :8], noised[:, :, :8], atol=1e-5, rtol=0)


def test_replacement_of_nothing_is_euler(model: VDT, balls: BouncingBall) -> None:
    cond = conditioned(balls.clips(MANY[:2]), mask_kind("unconditional"), [0, 1])
    assert torch.equal(video_masks.replaced(model, 3, False, cond), video_masks.drawn_by(model, 3, 2))
    assert Replacement(cond).evaluations(7) == 7


def test_the_exam_scores_what_was_made(balls: BouncingBall) -> None:
    exam = Exam.of(balls, TASKS)
    perfect = exam.scores(lambda cond: exam.clips)
    assert perfect["predict_psnr_db"] is None and perfect["interpolate_psnr_db"] is None
    floor = perfect["after_bounce_px"]
    assert floor is not None and 0 < floor < 0.06
    off = exam.scores(lambda cond: exam.clips.clamp(max=0.8), ["predict"])
    assert off.keys() == {"predict_psnr_db", "after_bounce_px"}
    half = exam.clips[:, :, 8:]
    error = (half.clamp(max=0.8) - half).square().mean()
    assert off["predict_psnr_db"] == pytest.approx(float(10 * (4 / error).log10()), abs=1e-3)


def tiny(keep: Path, **changes: Any) -> Arguments:
    sizes = {"steps": 4, "batch": 2, "clips": 6, "imagined": 0, "sampler_steps": 2}
    return Arguments(keep=keep, **{**sizes, **changes})


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The whole command on a tiny network records here."""
    folder = tmp_path / "benchmarks" / "results"
    folder.parent.mkdir()
    monkeypatch.setattr(common, "RESULTS", folder)
    monkeypatch.setattr(video_masks, "trained", partial(video_masks.trained, network=TINY))
    return folder / "video_masks.json"


def test_a_row_for_every_network_and_control(results: Path, tmp_path: Path) -> None:
    video_masks.main(tiny(tmp_path))
    recorded = json.loads(results.read_text())["rows"]
    rows, verdicts = recorded[: -len(CLAIMS)], recorded[-len(CLAIMS) :]
    assert [row["made_by"] for row in rows] == [*VARIANTS, *REPLACED, *WITHOUT_NETWORK, TRUTH]
    assert all(tuple(row) == ("made_by", *COLUMNS) for row in rows)
    by_name = {row["made_by"]: row for row in rows}
    for name, variant in VARIANTS.items():
        assert by_name[name]["steps"] == (1 if name.endswith(("_early", "_fewer")) else 4)
        for task in TASKS:
            assert (by_name[name][f"{task}_psnr_db"] is not None) == (task in variant.completes)
    assert by_name["without_time"]["parameters"] < by_name["mixed"]["parameters"]
    assert by_name["adaln"]["parameters"] > by_name["mixed"]["parameters"] == by_name["predict"]["parameters"]
    assert by_name["replacement"]["predict_psnr_db"] != by_name["mixed"]["predict_psnr_db"]
    assert [verdict["claim"] for verdict in verdicts] == [claim.words for claim in CLAIMS]
    unknown = ["frechet" in verdict["figures"] for verdict in verdicts]
    assert [verdict["holds"] is None for verdict in verdicts] == unknown == [False, False, False, True, False]


def test_networks_can_be_trained_one_by_one(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = tuple(VARIANTS)[1:]
    video_masks.main(tiny(tmp_path, networks=others))
    assert not results.exists()
    trained_on: list[int] = []
    batch = MaskedClipDataset.batch
    monkeypatch.setattr(
        MaskedClipDataset, "batch", lambda *given: trained_on.append(len(given[1])) or batch(*given)
    )
    video_masks.main(tiny(tmp_path))
    assert results.exists() and trained_on == [2] * 4  # only the first was left to do


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("killed", "batches"), [(False, 4), (True, 7)])
def test_a_stopped_training_goes_on(
    killed: bool, batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its third step, by Ctrl-C, which saves it, or by a kill before anything was saved."""
    whole = video_masks.trained("mixed", tiny(tmp_path / "whole"), TINY)
    seen, clips = [], BouncingBall.clips

    def stopping(balls: BouncingBall, indices: Tensor) -> Tensor:
        seen.append(indices)
        if len(seen) == 3:
            if killed:
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)
        return clips(balls, indices)

    monkeypatch.setattr(BouncingBall, "clips", stopping)
    with pytest.raises(KeyboardInterrupt):
        video_masks.trained("mixed", tiny(tmp_path / "cut"), TINY)
    for _ in range(2):  # the second finds it finished
        after = video_masks.trained("mixed", tiny(tmp_path / "cut"), TINY)
        assert len(seen) == batches
        for name, weight in whole.model.state_dict().items():
            assert torch.equal(after.model.state_dict()[name], weight)
    assert len((tmp_path / "cut" / "mixed" / LOSSES).read_text().splitlines()) == after.steps == 4
    with pytest.raises(ConfigError, match="steps was 4, now 8"):
        video_masks.trained("mixed", tiny(tmp_path / "cut", steps=8), TINY)


def test_distances_are_to_held_out_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With features that cost nothing: means of places, and of the differences there between frames."""

    def coarse(self: ClipFeature, network: None, clips: Tensor) -> Tensor:
        parts = [adaptive_avg_pool3d(x, (2, 4, 5)) for x in (clips, clips.diff(dim=2).abs())]
        return torch.cat([part.flatten(1) for part in parts], 1)

    monkeypatch.setattr(ClipFeature, "extract", coarse)
    monkeypatch.setattr(video_masks, "load_efficientnet_lite0", lambda: None)
    model = VDT(replace(TINY, frames=4, size=8)).eval()
    models = {name: video_masks.Trained(model, 1, 1) for name in VARIANTS}
    found = video_masks.distances(models, tiny(tmp_path, imagined=400, sampler_steps=1))
    assert found.keys() == {TRUTH, "mixed", "without_time"}
    assert 0 < found[TRUTH].frechet < found["mixed"].frechet == found["without_time"].frechet
    assert (found["mixed"].n_real, found["mixed"].n_fake) == (400, 400)


def figures(**own: dict[str, float]) -> list[dict[str, Any]]:
    """Rows on which every claim holds, but for changes."""
    row = {"predict_psnr_db": 20.0, "interpolate_psnr_db": 20.0, "after_bounce_px": 1.0, "frechet": 1.0}
    wins = {"mixed": {"predict_psnr_db": 21.0, "interpolate_psnr_db": 21.0, "after_bounce_px": 0.5}}
    names = [*VARIANTS, *REPLACED]
    rows = {name: {**row, **wins.get(name, {}), **own.get(name, {})} for name in names}
    return [{"made_by": name, **values} for name, values in rows.items()]


def test_claims_hold_where_their_figures_say_so() -> None:
    base = {"without_time": {"frechet": 2.1}}

    def holds(**own: dict[str, float]) -> list[object]:
        return [verdict["holds"] for verdict in video_masks.judge(figures(**{**base, **own}))]

    assert holds() == [True] * 5
    for index, own in enumerate(
        (
            {"replacement, fresh noise": {"predict_psnr_db": 22.0}},
            {"adaln": {"interpolate_psnr_db": 22.0}},
            {"predict": {"predict_psnr_db": 24.0}},
            {"without_time": {"frechet": 1.9}},
            {"mixed_early": {"after_bounce_px": 0.4}},
        )
    ):
        assert [i for i, kept in enumerate(holds(**own)) if not kept] == [index]
    said = video_masks.judge(figures())[1]["figures"]
    assert said == "predict_psnr_db: mixed 21, adaln 20; interpolate_psnr_db: mixed 21, adaln 20"


def test_what_cannot_be_run_is_refused_before_any_training() -> None:
    with pytest.raises(ConfigError, match=r"network 'mxed'.*mixed"):
        Arguments(networks=("mxed",))
    with pytest.raises(ConfigError, match="needs 400 clips"):
        Arguments(imagined=100)
