"""`ditkit compare`: the exact sampler and policies on the same seeds, speed beside error."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from ditkit.api.compare import compare as compared
from ditkit.caching.taylorseer import TaylorSeer
from ditkit.cli.options import (
    DataName,
    Labels,
    ModelName,
    Number,
    Options,
    Seeds,
    load_generator,
    options_of,
    progress,
    seeds_of,
    with_training_options,
    writable,
)
from ditkit.cli.sampling import Flattened, SamplingFlags
from ditkit.core.errors import ConfigError
from ditkit.core.policy import Policy
from ditkit.core.task import task_of
from ditkit.tasks.video.masks import KINDS, mask_kind

MaskName = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="KIND", help=f"Kind of masks on the clips of --data: {', '.join(KINDS)}. Default: predict."
    ),
]
DEMO_INTERVALS, DEMO_ORDERS = (3, 4, 6), (0, 1, 2)


def compare(
    model: ModelName,
    *,
    flags: Flattened = SamplingFlags(),
    demo: bool = False,
    seeds: Seeds = ("0..7",),
    label: Labels = (),
    converged_steps: Number = None,
    fewer_steps: bool = False,
    rounds: int = 3,
    no_memory: bool = False,
    data: DataName = None,
    option: Options = (),
    mask: MaskName = None,
    out: Path = Path("outputs/compare"),
) -> None:
    """Compare policies with the exact sampler: speed beside error.

    Each --policy is a row; the exact sampler is always the first.

    Examples:
        ditkit compare emoji --policy taylorseer:interval=4
        ditkit compare emoji --policy taylorseer --policy taylorseer:order=1 --seeds 0..15
        ditkit compare emoji --demo --out outputs/demo
        ditkit compare runs/vdt/model --policy taylorseer:interval=4 --guidance 1
        ditkit compare runs/video-dit/model --policy taylorseer --data moving-digits --mask interpolate

    Writes into the folder of --out:
        report.html    pictures or clips, plots, table in one file, for a browser
        report.json    every number, with what it means
        sheet.png      the pictures, or frames of the clips

    Args:
        model: A shipped model (emoji, digits), a folder, or owner/name on the Hugging Face hub.
        demo: Instead of --policy: TaylorSeer with intervals 3, 4, 6 and orders 0, 1, 2, and --fewer-steps.
        seeds: Whole numbers, or ranges such as 0..15 with both ends; one picture or clip a seed.
        label: Class to draw: one, or repeated, one a seed; default: spread over all classes.
        converged_steps: Of the run that stands for convergence. Default: ten times --steps.
        fewer_steps: Also rows for the exact sampler with as many steps as each policy computed in full.
        rounds: Timed passes over all seeds; the median counts.
        no_memory: Do not measure peak memory, which takes a process for each row.
        data: A named set or folder. Images: to report FID and KID against. Clips: given in part.
        option: Of the loader of --data, such as split=test or fps=10. Repeat it for several. Default,
            where the model was trained on these data: as it was.
        out: Folder to write to.
    """
    if not flags.policy and not demo:
        raise ConfigError("compare: got no --policy, expected one such as taylorseer:interval=4, or --demo")
    sampling = flags.make(seeds_of(seeds))
    if demo:
        sampling = sampling.changed(policies=demo_policies(flags.policy))
    network = load_generator(model, "compare")
    kind = None if mask is None else mask_kind(mask)
    loading = options_of(data, with_training_options(data, option, network))
    real, cond = task_of(network).reference(network, data, kind, sampling.seeds, **loading)
    with writable(out), progress() as advance:
        report = compared(
            network,
            label=label or None,
            cond=cond,
            sampling=sampling,
            converged_steps=converged_steps,
            rounds=rounds,
            memory=not no_memory,
            real=real,
            controls_as_rows=fewer_steps or demo,
            progress=advance,
        )
        files = report.save(out)
    Console().print(report.table())
    print(f"wrote {out}: " + ", ".join(file.name for file in files))
    print(f"open {next(file for file in files if file.suffix == '.html')} in a browser")


def demo_policies(given: tuple[str, ...]) -> list[Policy]:
    """Return the policies of `--demo`.

    Raises:
        ConfigError: others are given as well.
    """
    if given:
        raise ConfigError(f"compare: got --policy {given[0]} with --demo, expected one of the two")
    return [TaylorSeer(interval=n, order=o) for n in DEMO_INTERVALS for o in DEMO_ORDERS]
