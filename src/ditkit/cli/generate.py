"""`ditkit generate`: samples of a model, as files."""

from __future__ import annotations

import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ditkit.api.generate import generate as draw
from ditkit.bench.origin import origin
from ditkit.cli.options import (
    Labels,
    ModelName,
    Prompts,
    Seeds,
    for_stage,
    load_generator,
    seeds_of,
    writable,
)
from ditkit.cli.placing import on_device
from ditkit.cli.sampling import Flattened, SamplingFlags
from ditkit.core.checkpoint import write_json
from ditkit.core.errors import ConfigError
from ditkit.core.labels import class_index, class_names
from ditkit.core.model import Model
from ditkit.core.task import task_of
from ditkit.core.terminal import progress
from ditkit.sample import Samples

LONGEST = 60
"""Letters of a class or a prompt in the name of a file."""


@on_device
def generate(
    model: ModelName,
    *,
    label: Labels = (),
    prompt: Prompts = (),
    seeds: Seeds = ("0..7",),
    flags: Flattened = SamplingFlags(),
    out: Path = Path("outputs/generate"),
    list_labels: bool = False,
) -> None:
    """Draw samples with a trained model, one a seed: pictures, or unconditional clips.

    Examples:
        ditkit generate emoji
        ditkit generate emoji --list-labels
        ditkit generate emoji --label animal-mammal --seeds 0 1 2 3
        ditkit generate emoji --label animal-bird --label food-fruit --seeds 0..7
        ditkit generate emoji --policy taylorseer:interval=4,order=2
        ditkit generate runs/emoji-text/model --prompt "a red apple" --prompt "a sad cat"
        ditkit generate digits --seeds 0 1 --steps 25
        ditkit generate runs/mine/model --steps 25 --out outputs/mine

    Writes into the folder of --out:
        CLASS-SEED.png    each picture at its own size (CLASS@INDEX if names clash),
                          PROMPT-SEED.png of a model that takes a prompt,
                          or SEED.mp4 and SEED.gif of a clip (MP4 needs PyAV)
        sheet.png         all of them, enlarged; of clips, frames of the first
        generated.json    settings, what each policy did; day, device, versions

    Args:
        model: A shipped model (emoji, digits), a folder, or owner/name on the Hugging Face hub.
        label: Class to draw. Repeat it for several, each drawn with every seed; default: spread over all.
        prompt: Text to draw, of a model that takes one. Repeat it for several, each drawn with every seed; default:
            none, which draws whatever the model draws unasked.
        seeds: Whole numbers, or ranges such as 0..15 with both ends; one sample a seed.
        out: Folder to write to.
        list_labels: Print the classes and stop.
    """
    network = load_generator(model, "generate")
    if list_labels:
        print("\n".join(class_names(network)))
        return
    task, sampling = task_of(network), flags.make(seeds_of(seeds)).resolved(network)
    check_labels(network, label)
    if label and prompt:
        raise ConfigError(f"got --label {label[0]} with --prompt {prompt[0]!r}, expected one of the two")
    wanted: tuple[str | None, ...] = label or prompt or (None,)
    fields = [{"class": type(policy).__name__, **asdict(policy)} for policy in sampling.policies]  # type: ignore[call-overload]
    settings = {"model": model, **flags.as_dict(sampling), "policy_fields": fields}
    drawn: list[Samples] = []
    with writable(out), progress() as advance:
        for name in wanted:
            stage = for_stage(advance, f"drawing {name or ''}")
            word: dict[str, Any] = {"prompt": name} if prompt else {"label": name}
            drawn.append(draw(network, **word, sampling=task.settle(sampling), progress=stage))
        columns = len(sampling.seeds) if label or prompt else max(1, round(len(sampling.seeds) ** 0.5))
        samples = [one for d in drawn for one in d.samples]
        files = task.write(out, samples, names_of(network, drawn), columns)
        about = {**origin(), "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}
        write_json(
            out / "generated.json",
            {"settings": settings, **described(drawn, files, task.noun), "origin": about},
        )
    tell(drawn, files, task.noun, out)


def check_labels(model: Model, labels: Sequence[str]) -> None:
    """Refuse a class that the model does not have, or that is given twice."""
    chosen: set[int] = set()
    for label in labels:
        index = class_index(model, label)
        if index in chosen:
            raise ConfigError(f"--label {label!r} is given twice, expected each class once")
        chosen.add(index)


def names_of(model: Model, drawn: Sequence[Samples]) -> list[str]:
    """Return a name for the file of each sample; a class that is the only one counts where it has a name."""
    if any(d.prompts for d in drawn):
        stems = file_stems(list(dict.fromkeys(prompt for d in drawn for prompt in d.prompts)))
        return [
            f"{stems[prompt]}-{seed}" for d in drawn for seed, prompt in zip(d.seeds, d.prompts, strict=True)
        ]
    classes = class_names(model)
    if len(classes) < 2 and not getattr(model.config, "class_names", ()):
        return [f"{seed}" for seed, _ in iterate(drawn)]
    stems = file_stems(classes)
    return [f"{stems[label]}-{seed}" if label else f"{seed}" for seed, label in iterate(drawn)]


def described(drawn: Sequence[Samples], files: Sequence[str], noun: str) -> dict[str, object]:
    """Return the files with their seeds and labels, and their cost, as JSON."""
    return {
        f"{noun}s": [
            {"file": file, "seed": seed, "label": label} | ({"prompt": prompt} if prompt else {})
            for file, (seed, label), prompt in zip(files, iterate(drawn), prompts_of(drawn), strict=True)
        ],
        "seconds": sum(d.seconds for d in drawn),
        "policy_bytes": max(d.policy_bytes for d in drawn),
        "receipts": receipts(drawn),
    }


def tell(drawn: Sequence[Samples], files: Sequence[str], noun: str, out: Path) -> None:
    """Print the receipt of each policy, the time, and the names of the files."""
    for receipt in receipts(drawn):
        print(f"{receipt['policy']}, {receipt['sites']} sites")
        for lane, done in receipt["lanes"].items():
            print(f"  {lane}: " + ", ".join(f"{verb} {steps or 'none'}" for verb, steps in done.items()))
    seconds = sum(d.seconds for d in drawn)
    print(f"{len(files)} {noun}s in {seconds:.1f} s, {seconds / len(files):.2f} s each")
    print(f"wrote {out}: sheet.png, generated.json, {files[0]}{' ...' if len(files) > 1 else ''}")


def receipts(drawn: Sequence[Samples]) -> list[dict[str, Any]]:
    """List the receipts of the policies for all labels, each once where labels do not differ."""
    found: list[dict[str, Any]] = []
    for d in drawn:
        found += [r for receipt in d.receipts if (r := receipt.as_dict()) not in found]
    return found


def iterate(drawn: Sequence[Samples]) -> Iterator[tuple[int, str | None]]:
    """Yield the seed and the class of every sample."""
    for d in drawn:
        yield from zip(d.seeds, d.labels or (None,) * len(d.seeds), strict=True)


def prompts_of(drawn: Sequence[Samples]) -> list[str]:
    """Return the prompt of every sample, empty where there was none."""
    return [prompt for d in drawn for prompt in d.prompts or ("",) * len(d.seeds)]


def file_stems(classes: Sequence[str]) -> dict[str, str]:
    """Name each class in file names: its slug, with its index where another's is the same.

    A slug has no "@", and some file systems do not tell "A" from "a".
    """
    slugs = [slug(name) for name in classes]
    times = Counter(text.casefold() for text in slugs)
    return {
        name: text if times[text.casefold()] == 1 else f"{text}@{i}"
        for i, (name, text) in enumerate(zip(classes, slugs, strict=True))
    }


def slug(label: str) -> str:
    """`label` as part of a file name."""
    return re.sub(r"[^\w.-]+", "-", label)[:LONGEST].strip("-.") or "unnamed"
