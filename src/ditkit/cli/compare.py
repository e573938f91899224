"""`ditkit compare`: the exact sampler and policies on the same seeds, speed beside error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from torch import Tensor

from ditkit.api.compare import compare as compared
from ditkit.caching.taylorseer import TaylorSeer
from ditkit.cli.guiding import GUIDED, GuidingFlags
from ditkit.cli.options import (
    CLIP_AXES,
    DataName,
    Labels,
    ModelName,
    Number,
    Options,
    Policies,
    Seeds,
    options_of,
    policies_of,
    progress,
    seeds_of,
    solver_of,
    with_training_options,
    writable,
)
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.core.loading import load
from ditkit.core.model import Denoiser
from ditkit.core.policy import Policy
from ditkit.data.clips import Subset, spread
from ditkit.data.loading import load_held_out, load_images
from ditkit.sample.workload import UNCONDITIONED
from ditkit.tasks.video.masks import mask_kind
from ditkit.tasks.video.recipe import conditioned, labels_for
from ditkit.tasks.video.scores import UNCONDITIONAL

MaskName = Annotated[str | None, tyro.conf.arg(metavar="KIND")]
DEMO_INTERVALS, DEMO_ORDERS = (3, 4, 6), (0, 1, 2)
PREDICT = "predict"


def compare(
    model: ModelName,
    *,
    policy: Policies = (),
    demo: bool = False,
    seeds: Seeds = ("0..7",),
    label: Labels = (),
    steps: int = 50,
    guiding: GuidingFlags = GUIDED,
    solver: str = "euler",
    converged_steps: Number = None,
    fewer_steps: bool = False,
    rounds: int = 3,
    batch_size: int = 8,
    max_bytes: Number = None,
    no_memory: bool = False,
    data: DataName = None,
    option: Options = (),
    mask: MaskName = None,
    out: Path = Path("outputs/compare"),
) -> None:
    """Compare policies with the exact sampler: speed beside error.

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
        policy: Such as taylorseer:interval=4,order=2. Repeat it, a row each; exact is always there.
        demo: Instead of --policy: TaylorSeer with intervals 3, 4, 6 and orders 0, 1, 2, and --fewer-steps.
        seeds: Whole numbers, or ranges such as 0..15 with both ends; one picture or clip a seed.
        label: Class to draw: one, or repeated, one a seed; default: spread over all classes.
        steps: Steps of the solver.
        solver: From noise to sample: euler, heun, ddim, ancestral, eulermaruyama.
        converged_steps: Of the run that stands for convergence. Default: ten times --steps.
        fewer_steps: Also rows for the exact sampler with as many steps as each policy computed in full.
        rounds: Timed passes over all seeds; the median counts.
        batch_size: Samples drawn at once.
        max_bytes: Memory that a policy may hold; more is refused.
        no_memory: Do not measure peak memory, which takes a process for each row.
        data: A named set or a folder. Images (emoji): to report FID and KID against. Clips (moving-digits):
            given in part, out of the test split if there is one.
        option: Of the loader of --data, such as split=test or fps=10. Repeat it for several. Default,
            where the model was trained on these data: as it was.
        mask: What the clips of --data leave to be made: predict (the last half, the default), backward,
            interpolate, single-frame, random-frames, region, first-frame, first-last.
        out: Folder to write to.
    """
    policies = demo_policies(policy) if demo else policies_of(policy)
    if not policy and not demo:
        raise ConfigError("compare: got no --policy, expected one such as taylorseer:interval=4, or --demo")
    numbers, way, guidance = seeds_of(seeds), solver_of(solver), guiding.make()
    network = load(model)
    if not isinstance(network, Denoiser):
        raise ConfigError(
            f"{model} makes forecasts, expected pictures or clips; try: ditkit forecast {model}"
        )
    loading = options_of(data, with_training_options(data, option, network))
    real, cond = told(network, data, mask, numbers, **loading)
    with writable(out), progress() as advance:
        report = compared(
            network,
            policies,
            numbers,
            label=label or None,
            steps=steps,
            solver=way,
            guidance=guidance,
            cond=cond,
            converged_steps=converged_steps,
            rounds=rounds,
            batch_size=batch_size,
            max_bytes=max_bytes,
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
    """Those of `--demo`.

    Raises:
        ConfigError: others were asked for as well.
    """
    if given:
        raise ConfigError(f"compare: got --policy {given[0]} with --demo, expected one of the two")
    return [TaylorSeer(interval=n, order=o) for n in DEMO_INTERVALS for o in DEMO_ORDERS]


def told(
    network: Denoiser, data: str | None, mask: str | None, seeds: Sequence[int], **options: Any
) -> tuple[Tensor | None, Cond]:
    """What `--data` and `--mask` ask for: pictures to measure against, or clips that are given in part.

    `options` are those of the data's loader.

    Raises:
        ConfigError: they contradict each other or the model. Those of the loaders.
    """
    if mask is not None:
        mask_kind(mask)
    if len(network.signal_shape) != CLIP_AXES:
        if mask is not None:
            raise ConfigError(f"--mask {mask} with a model of pictures, expected one of clips")
        real = None if data is None else load_images(data, network.signal_shape[-1], **options).images_float()
        return real, UNCONDITIONED
    if data is None:
        if mask not in (None, UNCONDITIONAL):
            raise ConfigError(f"--mask {mask} without clips, expected --data, such as moving-digits")
        return None, UNCONDITIONED
    if mask == UNCONDITIONAL:
        raise ConfigError(f"--mask {mask} gives nothing of --data {data}, expected one of the two")
    clips = given_clips(network, data, len(seeds), **options)
    given = clips.clips(torch.arange(len(clips)))
    return None, conditioned(given, mask or PREDICT, seeds, labels_for(network, clips))


def given_clips(network: Denoiser, data: str, count: int, **options: Any) -> Subset:
    """`count` clips spread evenly over the set, of the length and size that the model makes.

    Raises:
        ConfigError: the set has other channels, or fewer clips. Those of the loader.
    """
    channels, frames, height, width = network.signal_shape
    whole = load_held_out(data, (height, width), frames, **options)
    if len(whole) < count:
        raise ConfigError(
            f"{data} has {len(whole)} clips of {frames} frames for {count} seeds, try: --seeds 0..{len(whole) - 1}"
        )
    clips = spread(whole, count)
    if clips.channels != channels:
        raise ConfigError(f"{data} has {clips.channels} channels, the model makes {channels}")
    return clips
