"""`ditkit compress`: a model folder in, a model folder out, with what was done in its config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from ditkit.api.compress import as_transforms
from ditkit.api.compress import compress as compressed
from ditkit.cli.options import ModelName, writable
from ditkit.cli.placing import on_device
from ditkit.core.errors import ConfigError
from ditkit.core.loading import load

Transforms = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TRANSFORM ...")]

More = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TRANSFORM")]


@on_device
def compress(model: ModelName, transforms: Transforms = (), *, out: Path, transform: More = ()) -> None:
    """Apply transforms to a model, in order, and save the result: prune, quantise or merge LoRA.

    `ditkit policies` lists them. A pruned model draws badly until it is trained again; the recipes tinyfusion-recovery
    and ppcl do that.

    Examples:
        ditkit compress emoji kept:blocks=0+2+4+6+8 --out outputs/pruned
        ditkit compress fashion-dit contiguous:remove=4 --out outputs/spans
        ditkit compress runs/tuned/model merged --out outputs/merged
        ditkit compress fashion-dit --transform temporalmaintenance:weights=4,iterations=500 --out outputs/w4a8

    Args:
        model: A shipped model (emoji), a folder, or owner/name on the Hugging Face hub.
        transforms: Changes of the weights: kept:blocks=0+2+3 keeps these blocks, counted from 0;
            contiguous:spans=4-5+8-9 makes one block of each span, and contiguous:remove=4 finds spans; merged adds
            LoRA's updates to the weights; lora:rank=8 adds untrained low-rank layers.
        out: Folder to write.
        transform: The same as a flag, applied after those. Repeat it for several.
    """
    chosen = as_transforms((*transforms, *transform))
    if (out / "config.json").exists():
        raise ConfigError(f"--out {out} holds a model already, expected another folder")
    before = load(model)
    after = compressed(before, *chosen)
    with writable(out):
        after.save(out)
    numbers = [sum(t.numel() for t in network.state_dict().values()) for network in (before, after)]
    print(f"{out}: {numbers[1]:,} numbers, {numbers[0]:,} before")
