"""`ditkit profile`: where the time of drawing goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from ditkit.api.profile import profile as profiled
from ditkit.bench.scaling import scaling, scaling_table
from ditkit.cli.options import Labels, ModelName, Seeds, load_generator, seeds_of, writable
from ditkit.cli.placing import on_device
from ditkit.cli.sampling import Flattened, SamplingFlags
from ditkit.core.errors import ConfigError

Scale = Annotated[str | None, tyro.conf.arg(metavar="FIELD=N,N,...")]


@on_device
def profile(
    model: ModelName,
    *,
    flags: Flattened = SamplingFlags(steps=10),
    seeds: Seeds = ("0..3",),
    label: Labels = (),
    scale: Scale = None,
    out: Path = Path("outputs/profile"),
) -> None:
    """Measure where the time of sampling goes: by part and operator class, with MACs, bytes and a roofline.

    The roofline is this machine's measured GMAC/s and memory bandwidth, which bound each operator class. In Python,
    ditkit.profile also takes a pipeline of diffusers.

    Examples:
        ditkit profile emoji
        ditkit profile emoji --policy taylorseer:interval=4 --steps 20
        ditkit profile digits --guidance 1 --seeds 0
        ditkit profile emoji --scale size=16,32,64

    Writes into the folder of --out:
        profile.json   every number
        profile.png    shares of time and MACs; operator classes under the roofline

    Args:
        model: A shipped model (emoji, digits), a folder, or owner/name on the Hugging Face hub.
        seeds: Whole numbers, or ranges such as 0..3 with both ends; one sample a seed.
        label: Class to draw: one, or repeated, one a seed; default: spread over all classes.
        scale: Instead of a profile, show how time and MACs grow with a field of the model's config: one forward pass
            for each value, with random weights.
        out: Folder to write to.
    """
    network = load_generator(model, "profile")
    if scale is not None:
        Console().print(scaling_table(scaling(network, *_scale_of(scale))))
        return
    sampling = flags.make(seeds_of(seeds)).resolved(network)
    with writable(out):
        found = profiled(network, label=label or None, sampling=sampling)
        files = found.save(out)
    for table in found.tables():
        Console().print(table)
        print()
    for line in found.remarks():
        print(line)
    print(f"wrote {out}: " + ", ".join(file.name for file in files))


def _scale_of(text: str) -> tuple[str, tuple[int, ...]]:
    """Read `size=16,32,64`.

    Raises:
        ConfigError: it is not of that form, or has fewer than two values.
    """
    field, _, values = text.partition("=")
    words = values.split(",")
    if not field or len(words) < 2 or not all(word.isdigit() and int(word) for word in words):
        raise ConfigError(f"--scale {text}, expected a field and two numbers or more, such as size=16,32,64")
    return field, tuple(map(int, words))
