"""`ditkit tune`: the setting of a policy that is near enough, or fast enough."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from ditkit.api.tune import Target
from ditkit.api.tune import tune as tuned
from ditkit.cli.compare import MaskName
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
from ditkit.core.errors import ConfigError
from ditkit.core.task import task_of
from ditkit.core.terminal import progress
from ditkit.tasks.video.masks import mask_kind

Decibels = Annotated[str | None, tyro.conf.arg(metavar="DB")]
Share = Annotated[float | None, tyro.conf.arg(metavar="SHARE")]
DECIBELS = re.compile(r"(\d+(?:\.\d+)?)(?:dB)?", re.ASCII | re.IGNORECASE)


@on_device
def tune(
    model: ModelName,
    *,
    flags: Flattened = SamplingFlags(),
    at_least: Decibels = None,
    at_most: Share = None,
    seeds: Seeds = ("0..3",),
    label: Labels = (),
    prompt: Prompts = (),
    converged_steps: Number = None,
    rounds: int = 3,
    data: DataName = None,
    option: Options = (),
    mask: MaskName = None,
    out: Path = Path("outputs/tune"),
) -> None:
    """Find the fastest setting within an error, or the one of least error within a time.

    A field of a --policy may have several values between bars, each of which is a setting.

    Examples:
        ditkit tune emoji --policy "taylorseer:interval=3|4|6,order=1|2" --at-least 35dB
        ditkit tune emoji --policy taylorseer --policy confidenttaylor --at-most 0.5
        ditkit tune runs/vdt/model --policy "taylorseer:interval=2|4" --at-least 40 --guidance 1

    Writes into the folder of --out:
        tune.json    the target, the best setting, the front, and all numbers

    Args:
        model: A shipped model (emoji), a folder, or owner/name on the Hugging Face hub.
        at_least: PSNR to the exact run that is near enough, such as 35dB: the fastest setting is named.
        at_most: Share of the exact run's time that is fast enough, such as 0.5: the nearest is named.
        seeds: Whole numbers, or ranges such as 0..3 with both ends; one picture or clip a seed.
        label: Class to draw: one, or repeated, one a seed; default: spread over all classes.
        prompt: Text to draw, of a model that takes one: one, or repeated, one a seed.
        converged_steps: Of the run that stands for convergence. Default: ten times --steps.
        rounds: Timed passes over all seeds; the median counts.
        data: Clips given in part, such as moving-digits.
        option: Option of the loader of --data, such as split=train or fps=10. Repeat it for several. Default,
            where the model was trained on these data: as it was.
        out: Folder to write to.
    """
    if not flags.policy:
        raise ConfigError('tune: got no --policy, expected one such as "taylorseer:interval=3|4"')
    target = Target(decibels(at_least), at_most)
    sampling = replace(flags, policy=()).make(seeds_of(seeds))
    network = load_generator(model, "tune")
    kind = None if mask is None else mask_kind(mask)
    loading = options_of(data, with_training_options(data, option, network))
    _, cond = task_of(network).reference(network, data, kind, sampling.seeds, **loading)
    with writable(out), progress() as advance:
        result = tuned(
            network,
            flags.policy,
            target,
            label=label or None,
            prompt=prompt or None,
            cond=cond,
            sampling=sampling,
            converged_steps=converged_steps,
            rounds=rounds,
            progress=advance,
        )
        path = result.save(out)
    Console().print(result.table())
    print(f"wrote {path}")


def decibels(text: str | None) -> float | None:
    """`35dB`, or `35`, as 35.

    Raises:
        ConfigError: it is no number of decibels.
    """
    if text is None:
        return None
    found = DECIBELS.fullmatch(text)
    if not found:
        raise ConfigError(f"--at-least {text}, expected decibels such as 35dB")
    return float(found[1])
