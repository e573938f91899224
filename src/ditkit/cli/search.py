"""`ditkit search`: which attention pattern each head of a model can do with, as a table in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from ditkit.api.search import Cost, Kind
from ditkit.api.search import search as searched
from ditkit.attention.searched import PATTERNS, HeadTable, Stripes, counted
from ditkit.cli.options import Labels, ModelName, Seeds, load_of, seeds_of
from ditkit.cli.placing import on_device
from ditkit.cli.sampling import Flattened, SamplingFlags
from ditkit.core.errors import ConfigError

Block = Literal[8, 16, 32, 64, 128, 256]
Shares = Annotated[tuple[float, float, float], tyro.conf.arg(metavar="SHARE SHARE SHARE")]


@on_device
def search(
    model: ModelName,
    *,
    block: Block = 128,
    sparsity: Shares = (0.8, 0.8, 0.8),
    stripes: Stripes = "top",
    epsilon: float = 0.5,
    weight: float = 0.5,
    target: float = 0.0,
    error: Kind = "relative",
    cost: Cost = "measured",
    follow: Literal["sparse", "dense"] = "sparse",
    seeds: Seeds = ("0..3",),
    label: Labels = (),
    flags: Flattened = SamplingFlags(steps=10, batch_size=4),
    out: Path = Path("outputs/heads.json"),
) -> None:
    """Search an attention pattern for each head of a video model, and save the table (Sparse-vDiT).

    Examples:
        ditkit search digits-video-dit --block 32 --steps 4 --seeds 0..1 --out outputs/heads.json
        ditkit search runs/video_dit/model --block 16 --target 0.6
        ditkit compare runs/video_dit/model --policy searched:table=outputs/heads.json

    Args:
        model: A shipped model, a folder, or owner/name on the Hugging Face hub.
        block: Tokens of a block of attention.
        sparsity: Shares of blocks that diagonal, multi-diagonal and striped heads leave out.
        stripes: Blocks that all queries see: top (of most attention), first (frame), even.
        epsilon: Greatest error + weight x cost of a pattern that is taken; else a head is dense.
        weight: Weight of the cost, lambda in the paper.
        target: Share of blocks to leave out, in place of --epsilon.
        error: Squared error of a head's output: relative to the output's square, or raw.
        cost: Measured on this machine, or 1 - sparsity.
        follow: The next layer sees what the chosen patterns give (sparse), or dense attention.
        seeds: Whole numbers, or ranges such as 0..3 with both ends; one clip a seed.
        label: Class to draw: one, or repeated, one a seed; default: spread over all classes.
        out: File to write.
    """
    if out.suffix != ".json":
        raise ConfigError(f"--out {out}, expected a name that ends in .json")
    network = load_of(model, "video")
    sampling = flags.make(seeds_of(seeds)).resolved(network)
    if sampling.policies:
        raise ConfigError("search draws under no policy, got --policy")
    found = searched(
        network,
        sampling.seeds,
        label=label or None,
        steps=sampling.steps,
        guidance=sampling.guidance,
        solver=sampling.solver,
        batch_size=sampling.batch_size,
        block=block,
        sparsity=sparsity,
        stripes=stripes,
        epsilon=epsilon,
        weight=weight,
        target=target,
        error=error,
        cost=cost,
        follow=follow,
    )
    found.save(out)
    Console().print(summary(found), highlight=False, markup=False)
    print(f"wrote {out}; use it with --policy searched:table={out}")


def summary(table: HeadTable) -> str:
    """Write the heads of each pattern, the table a line a layer, and the seconds of each pattern on this machine."""
    layers = [f"layer {i:>3}  {word}" for i, word in enumerate(table.heads)]
    seconds = ", ".join(f"{PATTERNS[m]} {s * 1e3:.1f} ms" for m, s in table.seconds.items())
    return "\n".join([counted(table.heads), *layers, f"one attention, all heads alike: {seconds}"])
