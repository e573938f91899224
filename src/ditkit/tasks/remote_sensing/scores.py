"""Scores of satellite series beside what needs no learning: on all pixels, and under the clouds alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ditkit.api.generate import generate
from ditkit.core.checkpoint import replacing
from ditkit.core.config import integer
from ditkit.core.errors import ConfigError, DataError
from ditkit.core.task import Evaluation, Progress
from ditkit.data.loading import accepts_option, load_satellite
from ditkit.data.satellite import SatelliteSet, Scenes
from ditkit.metrics.gap_filling import FILLINGS
from ditkit.metrics.spectral import ChangeScores, ImageScores, change_scores, image_scores
from ditkit.models.units import UniTS, UniTSConfig
from ditkit.report.sheet import png
from ditkit.sample import Samples, Sampling
from ditkit.tasks.remote_sensing.figures import page_of
from ditkit.tasks.remote_sensing.jobs import check_data, given, hidden_of, target

if TYPE_CHECKING:
    from rich.table import Table

COUNT, SHOWN = 16, 2
MODEL, MAJORITY = "UniTS", "most frequent class"
COLUMNS = {
    "psnr_db": ("PSNR, dB", 2),
    "ssim": ("SSIM", 3),
    "rmse": ("RMSE", 4),
    "mae": ("MAE", 4),
    "sam_deg": ("SAM, °", 2),
}
CHANGE_COLUMNS = {"miou": ("mIoU", 3), "bc": ("BC", 3), "sc": ("SC", 3), "scs": ("SCS", 3)}


@dataclass(frozen=True, eq=False)
class SeriesEvaluation(Evaluation):
    """A model and the baselines on the same windows.

    Args:
        scores: of each method, on all pixels. hidden: the same under the clouds alone, or in the future.
        change: of maps of classes, instead of both.
    """

    model: UniTS
    data: SatelliteSet
    scenes: Scenes
    drawn: Samples
    scores: Mapping[str, ImageScores]
    hidden: Mapping[str, ImageScores]
    change: Mapping[str, ChangeScores]
    has_split: bool

    @property
    def job(self) -> str:
        return self.model.config.job

    def as_dict(self) -> dict[str, Any]:
        config = self.model.config
        return {
            "job": self.job,
            "data": self.data.name,
            "simulated": self.data.simulated,
            "windows": len(self.drawn.seeds),
            "hidden_share": float(hidden_of(config, self.scenes).float().mean()),
            "all_pixels": {name: asdict(one) for name, one in self.scores.items()},
            self._part.replace(" ", "_"): {name: asdict(one) for name, one in self.hidden.items()},
            "change": {name: asdict(one) for name, one in self.change.items()},
            "evaluations": self.drawn.evaluations,
            "seconds": self.drawn.seconds,
            "receipts": [receipt.as_dict() for receipt in self.drawn.receipts],
        }

    @property
    def _part(self) -> str:
        return "in the future" if self.job == "forecasting" else "under the clouds"

    def table(self) -> Table:
        from rich import box
        from rich.table import Table

        table = Table(
            title=f"{self.job} on {len(self.drawn.seeds)} windows of {self.data.name}",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        columns = CHANGE_COLUMNS if self.change else COLUMNS
        table.add_column("pixels", no_wrap=True)
        table.add_column("from", no_wrap=True)
        for head, _ in columns.values():
            table.add_column(head, justify="right", no_wrap=True)
        parts: dict[str, Mapping[str, Any]] = {"all": self.change or self.scores, self._part: self.hidden}
        if self.job == "forecasting":
            del parts["all"]  # the past is given
        for part, methods in parts.items():
            for i, (name, one) in enumerate(methods.items()):
                cells = (f"{getattr(one, field):.{digits}f}" for field, (_, digits) in columns.items())
                table.add_row(part if i == 0 else "", name, *cells)
        return table

    def remarks(self) -> Iterator[str]:
        """Say what is simulated, and what is not held out."""
        count, seconds = len(self.drawn.seeds), self.drawn.seconds
        yield f"{count} windows in {seconds:.1f} s, {self.drawn.evaluations} evaluations each"
        if self.data.simulated:
            yield f"{self.data.name}: {self.data.simulated} are simulated from one real scene"
        if not self.has_split:
            yield f"{self.data.name} has no test split: windows of the training may be among these"

    def save(self, folder: Path) -> list[list[str]]:
        names = []
        for i in range(min(SHOWN, len(self.drawn.seeds))):
            name = f"series-{i}.png"
            page = page_of(self.model, self.data, self.scenes, self.drawn.samples, i, self._titles())
            with replacing(folder / name) as draft:
                draft.write_bytes(png(page))
            names.append(name)
        return [names]

    def _titles(self) -> dict[str, Sequence[str]]:
        if self.change:
            return {"classes": [MODEL, f"SCS {self.change[MODEL].scs:.3f} of all windows"]}
        return {"filled": [MODEL, *(f"{self.scores[MODEL].psnr_db:.2f} dB of all windows",)]}


def evaluate_series(
    model: UniTS,
    data: str,
    *,
    sampling: Sampling,
    options: Mapping[str, Any],
    count: int | None = None,
    progress: Progress | None = None,
) -> SeriesEvaluation:
    """Make of held-out windows what a model was trained for, and measure it beside the baselines.

    Args:
        sampling: with a seed for each window, or the default's.
        options: of the data's loader. count: windows from all over the data; 16 unless given, or all if fewer.

    Raises:
        ConfigError: data that do not fit the model, or hold fewer windows. DataError: they are missing or damaged, or
            nothing of them is known where it is to be judged.
    """
    count = COUNT if count is None else integer("--count", count, least=1)
    own = sampling.seeds == Sampling().seeds
    whole, has_split, scenes = held_out(
        model, data, count if own else len(sampling.seeds), options, fewer=own
    )
    seeds = range(len(scenes.image)) if own else sampling.seeds
    check_judged(model.config, scenes, whole.name)
    stage = None if progress is None else partial(progress, "making series")
    drawn = generate(
        model,
        cond=given(model.config, scenes),
        shape=target(model.config, scenes)[0].shape[1:],
        sampling=sampling.changed(seeds=seeds),
        progress=stage,
    )
    judged = judge(model.config, scenes, {MODEL: drawn.samples})
    return SeriesEvaluation(model, whole, scenes, drawn, *judged, has_split)


def held_out(
    model: UniTS, data: str, count: int, options: Mapping[str, Any], fewer: bool = False
) -> tuple[SatelliteSet, bool, Scenes]:
    """Load windows from all over the test split, of the model's size; say whether it shares no pixel with training.

    Args:
        fewer: take what there is, if that is less.

    Raises:
        ConfigError: data that do not fit the model, or hold fewer windows. DataError: those of the loader.
    """
    chosen = {"split": "test", **options} if accepts_option(data, "split") else dict(options)
    whole = load_satellite(data, model.config.shape[1:], frames=model.config.frames, **chosen)
    check_data(model.config, whole)
    if len(whole) < count and not fewer:
        raise ConfigError(f"{data} has {len(whole)} windows for {count} seeds, try: --count {len(whole)}")
    count = min(count, len(whole))
    return whole, whole.has_split, whole.scenes(torch.arange(count) * len(whole) // count)


def check_judged(config: UniTSConfig, scenes: Scenes, name: str) -> None:
    """Refuse windows of which nothing is clear, or nothing is known where it would be judged.

    Raises:
        DataError: so it is.
    """
    if config.job == "change-detection":
        if scenes.labels is None or not (scenes.labels >= 0).any():
            raise DataError(f"{name} has no classes to be judged by, expected maps in classes/")
        return
    hidden, known = hidden_of(config, scenes), target(config, scenes)[1]
    if not (hidden & known).any():
        raise DataError(f"{name}: nothing that is hidden is known, so nothing can be judged")
    if config.job == "reconstruction" and hidden.all() and not config.radar_channels:
        raise DataError(f"{name}: all of every date is hidden, expected something that is clear")


def judge(
    config: UniTSConfig, scenes: Scenes, predicted: Mapping[str, Tensor]
) -> tuple[dict[str, ImageScores], dict[str, ImageScores], dict[str, ChangeScores]]:
    """Score what methods predicted, [n, C, T, H, W] each, beside the baselines: on all pixels and on hidden ones."""
    truth, known = target(config, scenes)
    if config.job == "change-detection":
        assert scenes.labels is not None
        labels = scenes.labels
        frequent = labels[labels >= 0].mode().values
        maps = {name: one.argmax(1) for name, one in predicted.items()} | {
            MAJORITY: torch.full_like(labels, int(frequent))
        }
        return {}, {}, {name: change_scores(one, labels, config.channels) for name, one in maps.items()}
    hidden = hidden_of(config, scenes)
    source = scenes.observed if config.job == "cloud-removal" else scenes.image
    methods = {name: one.float() for name, one in predicted.items()}
    methods |= {name: fill(source, hidden, scenes.days) for name, fill in FILLINGS.items()}
    everywhere = known & hidden if config.job == "forecasting" else known  # the past is given
    whole = {name: image_scores(one, truth, everywhere) for name, one in methods.items()}
    return whole, {name: image_scores(one, truth, known & hidden) for name, one in methods.items()}, {}
