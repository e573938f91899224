"""Ship a trained run: its averaged weights in 16 bits, and a card that says what they are.

    python tools/model_card.py --run runs/emoji --name emoji --std 0.05
    ditkit evaluate emoji --data emoji --out outputs/evaluate
    python tools/model_card.py --run runs/emoji --name emoji --std 0.05 --hours 2.6 --evaluation outputs/evaluate

The first writes src/ditkit/weights/<name>/ (config.json, model.safetensors), the second measures what was written
(`ditkit video` for a video model), and the last adds README.md, from tools/cards/<name>.md, and docs/<name>/ (loss
curve, pictures).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from ditkit.core.catalog import find
from ditkit.core.checkpoint import read_json, replacing
from ditkit.core.config import config_of
from ditkit.core.model import Model, parameter_count
from ditkit.tasks.recipe import training_of
from ditkit.train.posthoc import read_snapshots, reconstruct

ROOT = Path(__file__).parents[1]
LOSS_ROWS = (0, 4, 9, 19, 39)
"""Hundreds of steps that the table of losses shows, beside the last."""


@dataclass(frozen=True)
class Arguments:
    """What to ship.

    Args:
        run: folder of the training run. name: of the shipped model, and of its text in tools/cards.
        kind: class of the network. hours, hardware: that the training took.
        std: relative width of the average that ships, reconstructed from the run's snapshots, the last of which need
            not be at the run's end; 0 for the run's own first average.
        evaluation: folder that `ditkit evaluate` or `ditkit video` wrote for the shipped weights; with it the card is
            written.
    """

    run: Path
    name: str
    kind: str = "DiT"
    hours: float = 0.0
    hardware: str = "one CPU core"
    std: float = 0.0
    evaluation: Path | None = None


def main(arguments: Arguments) -> None:
    recipe = read_json(arguments.run / "recipe.json")
    model, steps = averaged(arguments, recipe)
    lines = (json.loads(line) for line in (arguments.run / "losses.jsonl").read_text().splitlines())
    losses = [line for line in lines if line["step"] <= steps]
    batch = recipe["settings"]["batch"]
    folder = ROOT / "src" / "ditkit" / "weights" / arguments.name
    model.save(folder, torch.float16)
    size = sum(p.stat().st_size for p in folder.iterdir()) / 1e6
    print(f"{folder.relative_to(ROOT)}: {parameter_count(model):,} parameters, {size:.1f} MB")
    if arguments.evaluation is None:
        return
    docs = ROOT / "docs" / arguments.name
    docs.mkdir(parents=True, exist_ok=True)
    plot_losses(losses, docs / "loss.png", of=model.config.convention.prediction)
    facts = {"parameters": parameter_count(model), "hours": arguments.hours, "hardware": arguments.hardware}
    told = (ROOT / "tools" / "cards" / f"{arguments.name}.md").read_text(encoding="utf8")
    with replacing(folder / "README.md") as draft:
        text = told.format(
            **facts,
            trained=recipe["data"],
            steps=steps,
            batch=batch,
            average=arguments.std or recipe["settings"]["averages"][0]["std"],
            seen=batch * steps,
            epochs=batch * steps / recipe["samples"],
            curve=curve(losses),
            measured=measured(arguments.evaluation, docs),
        )
        draft.write_text(text, encoding="utf8")
    print(f"{(folder / 'README.md').relative_to(ROOT)}, docs/{arguments.name}/")


def averaged(arguments: Arguments, recipe: dict[str, Any]) -> tuple[Model, int]:
    """The average that ships, and the steps after which it was taken."""
    if not arguments.std:
        model = Model.load(arguments.run / "model")
        return model, recipe["settings"]["steps"]
    snapshots = read_snapshots(arguments.run / "snapshots")
    kind: type[Model] = find(Model, arguments.kind)  # type: ignore[type-abstract]
    config = config_of(kind.Config, recipe["model"], arguments.run / "recipe.json")
    state = reconstruct(snapshots, snapshots[-1].step, arguments.std)
    model, last = kind.holding(config, state, "reconstructed average"), snapshots[-1].step
    run = training_of(recipe["data"], recipe["options"], last, recipe["settings"]["batch"])
    model.history = ({**run, "average": arguments.std},)
    return model, last


def smoothed(losses: list[dict[str, Any]], window: int = 100) -> tuple[list[int], list[float]]:
    """Means of the loss over consecutive windows of steps."""
    parts = [losses[i : i + window] for i in range(0, len(losses), window)]
    return [p[-1]["step"] for p in parts], [sum(row["loss"] for row in p) / len(p) for p in parts]


def curve(losses: list[dict[str, Any]]) -> str:
    """A table of the smoothed loss at a few steps."""
    steps, means = smoothed(losses)
    shown = [i for i in range(len(steps)) if i in LOSS_ROWS or i == len(steps) - 1]
    return "\n".join(table(("step", "loss"), ((f"{steps[i]:,}", f"{means[i]:.4f}") for i in shown)))


def plot_losses(losses: list[dict[str, Any]], path: Path, of: str) -> None:
    """The loss curve, averaged over 100 steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(*smoothed(losses))
    axes.set(xlabel="optimiser step", ylabel=f"mean squared error of the {of}", yscale="log")
    axes.grid(alpha=0.3, which="both")
    with replacing(path) as draft:
        figure.savefig(draft, format="png", dpi=120)


def measured(evaluation: Path, docs: Path) -> str:
    """The command that evaluated and its figures; its pictures go to `docs`."""
    if (evaluation / "video.json").exists():
        found = read_json(evaluation / "video.json")
        pictures, rows = [f"{each['mask']}.png" for each in found["masks"]], video_rows(found)
        heads: tuple[str, ...] = ("mask", "made by", "PSNR, dB", "SSIM", "temporal error")
    else:
        found = read_json(evaluation / "evaluation.json")
        pictures, rows, heads = ["sheet.png", "neighbours.png"], image_rows(found), ("figure", "value")
    for name in pictures:
        shutil.copyfile(evaluation / name, docs / name)
    return "\n".join([f"By `{found['command']}`.", "", *table(heads, rows)])


def image_rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in found.items():
        if isinstance(value, str | int | float | None) and key not in ("command", "policy_bytes"):
            yield key, cell(value)


def video_rows(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for each in found["masks"]:
        for by in ("model", "baseline"):
            if (scores := each[by]) is not None:
                figures = (f"{scores[key]:.3f}" for key in ("psnr_db", "ssim", "temporal_error"))
                yield (each["mask"], by, *figures)


def table(heads: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> list[str]:
    """Lines of Markdown."""
    return [f"| {' | '.join(line)} |" for line in (heads, ("---",) * len(heads), *rows)]


def cell(value: str | float | None) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else ("not measured" if value is None else value)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
