"""`ditkit compare`: the exact sampler and policies on the same seeds, speed beside error."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from ditkit.api.compare import compare as compared
from ditkit.api.generate import generate
from ditkit.caching.confident_taylor import ConfidentTaylor
from ditkit.caching.taylorseer import TaylorSeer
from ditkit.cli.options import (
    DataName,
    Labels,
    ModelName,
    Number,
    Options,
    Prompts,
    Seeds,
    load_generator,
    options_of,
    seeds_of,
    with_training_options,
    writable,
)
from ditkit.cli.placing import on_device
from ditkit.cli.sampling import Flattened, SamplingFlags
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.core.policy import Policy
from ditkit.core.task import task_of
from ditkit.core.terminal import progress
from ditkit.sample import Sampling
from ditkit.tasks.video.masks import KINDS, mask_kind

Rivals = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="[NAME=]FOLDER")]
MaskName = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="KIND", help=f"Kind of masks on the clips of --data: {', '.join(KINDS)}. Default: predict."
    ),
]
DEMO_SETTINGS = ((4, 1), (6, 2))
"""Intervals and orders of TaylorSeer in the demo, beside the default policy of `ditkit.accelerate`."""
ROUNDS, DEMO_ROUNDS = 3, 1
DEMO_CONVERGED = 2  # times the steps; ten times, as elsewhere, would take longer than all else
PROBE_STEPS = 10
FIRST = "first.png"
NARROW = 80
PICTURES = 4  # axes of a batch of them


@on_device
def compare(
    model: ModelName,
    *,
    flags: Flattened = SamplingFlags(),
    rival: Rivals = (),
    demo: bool = False,
    seeds: Seeds = ("0..7",),
    label: Labels = (),
    prompt: Prompts = (),
    converged_steps: Number = None,
    fewer_steps: bool = False,
    rounds: Number = None,
    no_memory: bool = False,
    data: DataName = None,
    option: Options = (),
    mask: MaskName = None,
    out: Path = Path("outputs/compare"),
) -> None:
    """Compare policies, or other models, with the exact sampler: speed beside error.

    Each --policy is a row, and each --rival; the exact sampler is always the first.

    Examples:
        ditkit compare emoji --policy taylorseer:interval=4
        ditkit compare emoji --policy taylorseer --policy taylorseer:order=1 --seeds 0..15
        ditkit compare emoji --demo --out outputs/demo
        ditkit compare emoji --rival pruned=outputs/pruned
        ditkit compare runs/vdt/model --policy taylorseer:interval=4 --guidance 1
        ditkit compare runs/video-dit/model --policy taylorseer --data moving-digits --mask interpolate

    Writes into the folder of --out:
        report.html    pictures or clips, plots, table in one file, for a browser
        report.json    every number, with what it means
        sheet.png      the pictures, or frames of the clips

    Args:
        model: A shipped model (emoji, digits), a folder, or owner/name on the Hugging Face hub.
        rival: Another model, FOLDER or NAME=FOLDER, such as what ditkit compress made of this one. Repeat it for
            several.
        demo: Instead of --policy: a few that show most in three minutes, with --fewer-steps and --no-memory.
        seeds: Whole numbers, or ranges such as 0..15 with both ends; one picture or clip a seed.
        label: Class to draw: one, or repeated, one a seed; default: spread over all classes.
        prompt: Text to draw, of a model that takes one: one, or repeated, one a seed.
        converged_steps: Steps of the run that stands for the sampler's limit. Default: 10 times --steps; --demo: 2.
        fewer_steps: Also rows for the exact sampler with as many steps as each policy computed in full.
        rounds: Timed passes over all seeds; the median counts. Default: 3; --demo: 1.
        no_memory: Do not measure peak memory, which takes a process for each row.
        data: A named set or folder. Images: to report FID and KID against. Clips: given in part.
        option: Option of the loader of --data, such as split=test or fps=10. Repeat it for several. Default,
            where the model was trained on these data: as it was.
        out: Folder to write to.
    """
    if not flags.policy and not demo and not rival:
        raise ConfigError(
            "compare: got no --policy and no --rival, expected one such as taylorseer:interval=4, or --demo"
        )
    sampling = flags.make(seeds_of(seeds))
    network = load_generator(model, "compare")
    rivals = rivals_of(rival)
    if demo:
        sampling = sampling.changed(policies=demo_policies(flags.policy))
        converged_steps = converged_steps or DEMO_CONVERGED * sampling.steps
    rounds = (DEMO_ROUNDS if demo else ROUNDS) if rounds is None else rounds
    kind = None if mask is None else mask_kind(mask)
    loading = options_of(data, with_training_options(data, option, network))
    real, cond = task_of(network).reference(network, data, kind, sampling.seeds, **loading)
    with writable(out), progress() as advance:
        if demo and converged_steps is not None:
            seconds = first_picture(
                out / FIRST, network, cond, sampling, label=label or None, prompt=prompt or None
            )
            total = seconds * demo_evaluations(sampling, rounds, converged_steps)
            print(
                f"wrote {out / FIRST}; the comparison takes about {total:.0f} s", file=sys.stderr, flush=True
            )
        report = compared(
            network,
            label=label or None,
            prompt=prompt or None,
            cond=cond,
            sampling=sampling,
            converged_steps=converged_steps,
            rounds=rounds,
            memory=not (no_memory or demo),
            real=real,
            controls_as_rows=fewer_steps or demo,
            rivals=rivals,
            progress=advance,
        )
        files = report.save(out)
    if (columns := Console().width) < NARROW:
        print(f"the table needs {NARROW} columns and this terminal has {columns}: see report.html")
    else:
        Console().print(report.table())
    print(f"wrote {out}: " + ", ".join(file.name for file in files))
    print(f"open {next(file for file in files if file.suffix == '.html')} in a browser")


def rivals_of(words: tuple[str, ...]) -> dict[str, Any]:
    """Load the models of `--rival FOLDER` and `--rival NAME=FOLDER` by name.

    Raises:
        ConfigError: two have one name, or one draws nothing. Those of `load`.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, source = word.partition("=")
        if not name or (equals and not source):
            raise ConfigError(f"--rival {word}, expected FOLDER or NAME=FOLDER")
        if name in found:
            raise ConfigError(f"--rival {word}: {name!r} is given twice, expected names of their own")
        found[name] = load_generator(source or name, "compare")
    return found


def demo_policies(given: tuple[str, ...]) -> list[Policy]:
    """Return the policies of `--demo`.

    Raises:
        ConfigError: others are given as well.
    """
    if given:
        raise ConfigError(f"compare: got --policy {given[0]} with --demo, expected one of the two")
    return [ConfidentTaylor(interval=3), *(TaylorSeer(interval=n, order=o) for n, o in DEMO_SETTINGS)]


def first_picture(path: Path, network: Any, cond: Cond, sampling: Sampling, **words: Any) -> float:
    """Draw all seeds in few exact steps, as a picture; return the seconds of one evaluation of them.

    What a task draws of other samples than pictures is left to the report: then nothing is written.
    """
    from ditkit.report.sheet import grid, write_png

    drawn = generate(network, cond=cond, sampling=sampling, policies=(), steps=PROBE_STEPS, **words)
    if drawn.samples.ndim == PICTURES:
        write_png(path, grid(drawn.samples, columns=len(drawn.samples)))
    return drawn.seconds / drawn.evaluations


def demo_evaluations(sampling: Sampling, rounds: int, converged_steps: int) -> int:
    """Count the evaluations of the demo, those forecast as none: each policy has a control that costs the same."""
    policies: Any = sampling.policies
    fast = 2 * sum(len(policy.full_steps(sampling.steps)) for policy in policies)
    return converged_steps + (rounds + 1) * (sampling.steps + fast) + fast // 2
