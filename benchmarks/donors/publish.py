"""Make a donor of a training run, finished or not: its newest average ships, and three earlier ones are kept.

    python benchmarks/donors/publish.py runs/fashion-dit
    python benchmarks/donors/publish.py runs/digits-video-dit

Writes src/ditkit/weights/NAME/ (config.json, model.safetensors in 16 bits, README.md from tools/cards/NAME.md) and
benchmarks/donors/NAME/{25,50,75}/, the averages at 25, 50 and 75 % of the run as far as it has come; NAME is that of
the run's folder. What was measured of these weights, as `measure.py` or `ditkit video` writes it into
benchmarks/donors/NAME/, goes into the card. Nothing of ditkit is imported, only the files of a run are read:
state.safetensors, recipe.json, losses.jsonl and snapshots/.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SHARES = (25, 50, 75)
"""Per cent of the run's steps at which an average is kept."""
AVERAGE = "average.0."
"""Names of the first average's tensors in a run's state."""
DIGEST = "config_sha256"
"""What a model's weights say of the config that they were saved with."""
LOOK_NOT = ("split", "length", "episodes", "max_bad", "max_bytes")
"""Options of a loader that a model's history leaves out."""
LOSS_STEPS = (100, 500, 1_000, 2_000, 3_000)
"""Steps that the card's table of losses shows, beside the last."""
KINDS = {"fashion-dit": "DiT", "digits-video-dit": "VideoDiT"}
"""Class of the network by donor: a run's record has its config alone."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run of `ditkit train`")
    run = parser.parse_args().run
    recipe, name = json.loads((run / "recipe.json").read_text()), run.resolve().name
    state, step = newest(run / "state.safetensors")
    weights = ROOT / "src" / "ditkit" / "weights" / name
    stamp(HERE / name / "video.json", weights / "config.json")
    save(weights, name, recipe, state, step)
    for share in SHARES:
        snapshot = snapshot_at(run / "snapshots", recipe["settings"]["steps"] * share // 100)
        if snapshot is not None:
            tensors, at = read(snapshot)
            save(HERE / name / str(share), name, recipe, tensors, at)
    losses = [json.loads(line) for line in (run / "losses.jsonl").read_text().splitlines()]
    card = describe(name, recipe, [row for row in losses if row["step"] <= step], state)
    (weights / "README.md").write_text(card, encoding="utf8")


def stamp(scores: Path, config: Path) -> None:
    """Note in the scores of the weights that ship so far after how many steps these were taken."""
    if scores.exists() and "trained_steps" not in (about := json.loads(scores.read_text())):
        about["trained_steps"] = json.loads(config.read_text())["history"][-1]["steps"]
        scores.write_text(json.dumps(about, indent=2) + "\n", encoding="utf8")


def newest(path: Path) -> tuple[dict[str, torch.Tensor], int]:
    """The first average of a resumable state, and the number of steps after which it was written."""
    state, step = read(path)
    return {k.removeprefix(AVERAGE): v for k, v in state.items() if k.startswith(AVERAGE)}, step


def snapshot_at(folder: Path, step: int) -> Path | None:
    """The snapshot of an average after `step` steps, if the run has come so far."""
    return next(iter(sorted(folder.glob(f"{step:08d}-*.safetensors"))), None)


def read(path: Path) -> tuple[dict[str, torch.Tensor], int]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, int(file.metadata()["step"])  # noqa: SIM118


def save(folder: Path, name: str, recipe: dict[str, Any], state: dict[str, torch.Tensor], step: int) -> None:
    """A model folder of float16 weights, both files renamed into place."""
    settings = recipe["settings"]
    trained = {
        "trained": recipe["data"],
        "options": {k: v for k, v in recipe["options"].items() if k not in LOOK_NOT},
        "steps": step,
        "batch": settings["batch"],
        "average": settings["averages"][0]["std"],
    }
    described = {"model": KINDS[name], "config": recipe["model"], "history": [trained]}
    canonical = json.dumps(described, sort_keys=True, separators=(",", ":"))
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / ".model.safetensors"
    halves = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    save_file(halves, draft, {DIGEST: hashlib.sha256(canonical.encode()).hexdigest()})
    draft.chmod(0o644)
    draft.rename(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf8")
    size = (folder / "model.safetensors").stat().st_size
    print(f"{folder.relative_to(ROOT)}: step {step:,} of {settings['steps']:,}, {size / 1e6:.1f} MB")


def describe(
    name: str, recipe: dict[str, Any], losses: list[dict[str, Any]], state: dict[str, torch.Tensor]
) -> str:
    """The card's text with the facts of the run."""
    settings, steps = recipe["settings"], losses[-1]["step"]
    planned = settings["steps"]
    return (
        (ROOT / "tools" / "cards" / f"{name}.md")
        .read_text(encoding="utf8")
        .format(
            parameters=sum(v.numel() for v in state.values()),
            steps=steps,
            planned=planned,
            state="to its end"
            if steps == planned
            else f"so far {steps / planned:.0%} of the recipe's {planned:,}",
            batch=settings["batch"],
            seen=steps * settings["batch"],
            epochs=steps * settings["batch"] / recipe["samples"],
            hours=sum(row["processor_seconds"] for row in losses) / 3600,
            average=settings["averages"][0]["std"],
            curve="\n".join(table(("step", "loss"), curve(losses))),
            measured="\n".join(measured(HERE / name, steps)),
        )
    )


def curve(losses: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """The mean loss of the 100 steps up to some steps."""
    last = losses[-1]["step"]
    for step in [*(s for s in LOSS_STEPS if s < last), last]:
        near = [row["loss"] for row in losses if step - 100 < row["step"] <= step]
        yield f"{step:,}", f"{sum(near) / len(near):.4f}"


def measured(folder: Path, steps: int) -> Iterator[str]:
    """Commands and figures of the files in the donor's folder that say what was measured."""
    found = [folder / name for name in ("measured.json", "video.json") if (folder / name).exists()]
    if not found:
        yield "Not yet measured."
    for path in found:
        about = json.loads(path.read_text())
        late = about["trained_steps"]
        yield f"By `{about['command']}`" + (f", after {late:,} steps." if late != steps else ".")
        yield ""
        if "masks" in about:
            yield from table(
                ("mask", "made by", "PSNR, dB", "SSIM", "temporal error"), of_masks(about["masks"])
            )
        else:
            yield from table(
                ("figure", "value"), ((k.replace("_", " "), str(v)) for k, v in about["figures"].items())
            )


def of_masks(masks: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for each in masks:
        for by in ("model", "baseline"):
            if (scores := each[by]) is not None:
                figures = (f"{scores[key]:.3f}" for key in ("psnr_db", "ssim", "temporal_error"))
                yield (each["mask"], by, *figures)


def table(heads: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> list[str]:
    """Lines of Markdown."""
    return [f"| {' | '.join(line)} |" for line in (heads, ("---",) * len(heads), *rows)]


if __name__ == "__main__":
    main()
