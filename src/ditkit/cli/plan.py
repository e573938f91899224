"""`ditkit plan`: which keys a query sees under an attention pattern, as a picture and a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from torch import Tensor

from ditkit.api.generate import generate
from ditkit.attention.pattern import Pattern
from ditkit.attention.searched import Searched
from ditkit.bench.plans import Place, Planned, places, rows_of, table
from ditkit.cli.options import Policies, policies_of, writable
from ditkit.core.catalog import every
from ditkit.core.checkpoint import replacing
from ditkit.core.config import LARGEST, integer
from ditkit.core.errors import ConfigError
from ditkit.core.grid import Grid
from ditkit.core.loading import load
from ditkit.core.model import Denoiser, Model
from ditkit.core.task import generating
from ditkit.data.decode import DamagedImage, read_square
from ditkit.report.plan_picture import plan_page
from ditkit.report.sheet import png

OptionalModel = Annotated[str | None, tyro.conf.Positional]
Sides = Annotated[str | None, tyro.conf.arg(metavar="TxHxW")]
Rows = Annotated[int | None, tyro.conf.arg(metavar="INT")]
Queries = Annotated[tuple[str, ...], tyro.conf.arg(metavar="T,Y,X ...")]
Picture = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
SAMPLE_STEPS, PICTURE_PX = 25, 512
MOST_TOKENS = 2**22
"""Tokens of a grid, whose plan has a place for each pair of blocks of them."""


def plan(
    model: OptionalModel = None,
    *,
    policy: Policies = (),
    grid: Sides = None,
    text: Rows = None,
    size: Sides = None,
    query: Queries = (),
    over: Picture = None,
    sample: bool = False,
    out: Path = Path("outputs/plan.png"),
) -> None:
    """Draw the keys that a query attends to under sparse attention patterns, and print the share computed.

    A model runs only with --sample. Grids are counted in tokens, not in pixels.

    Examples:
        ditkit plan runs/video_dit/model --policy grouped:group=2+4+4,block=32
        ditkit plan runs/video_dit/model --policy grouped:group=2+4+4,block=32 --sample
        ditkit plan --grid 32x48x80 --text 256 --policy grouped --policy grouped:reach=2
        ditkit plan --grid 64x64 --policy grouped --query 3,5 60,60 --out outputs/flux.png
        ditkit plan --grid 16x8x8 --policy searched:heads=0123+2223,block=16

    Args:
        model: A shipped model (emoji), a folder, or owner/name on the Hugging Face hub; or none, with --grid.
        policy: A pattern such as grouped:reach=1. Repeat it, a section each.
        grid: Without a model: tokens of a picture, such as 64x64, or of a clip, 32x48x80.
        text: Without a model: text tokens beside them.
        size: Size of a sample in pixels, for a clip with its frames. Default: the model's own.
        query: Query tokens, such as 8,4,4, in a picture 4,4. Default: centre, corner, border.
        over: A picture to lay the keys over, cut to fit.
        sample: Lay them over a sample that the model draws.
        out: Picture to write.
    """
    patterns = patterns_of(policy)
    if out.suffix != ".png":
        raise ConfigError(f"--out {out}, expected a name that ends in .png")
    network, tokens, others = laid_out(model, grid, text, size)
    if network is not None:
        for pattern in patterns:
            pattern.check_model(network)
            if isinstance(pattern, Searched):
                pattern.resolved(network.sites())
    wanted = queries_of(query, tokens) if query else places(tokens)
    if over is not None and sample:
        raise ConfigError(f"got --over {over} with --sample, expected one of the two")
    if sample and not isinstance(network, Denoiser):
        raise ConfigError("got --sample without a model that draws, expected --over FILE")
    with writable(out.parent):
        # commands run a model on the processor; a bare grid is that of a pipeline, which has the GPU
        device = "cuda" if network is None and torch.cuda.is_available() else "cpu"
        plans = [part for pattern in patterns for part in Planned.parts(pattern, tokens, others, device)]
        page = png(plan_page(plans, wanted, underlay(network, size, sample, over)))
        with replacing(out) as draft:
            draft.write_bytes(page)
    Console().print(table(plans))
    print(f"wrote {out}")


def patterns_of(specs: Sequence[str]) -> list[Pattern]:
    """Parse the patterns of `--policy`.

    Raises:
        ConfigError: there is none, or another kind of policy. Those of `policies_of`.
    """
    names = ", ".join(cls.__name__.lower() for cls in every(Pattern))  # type: ignore[type-abstract]
    if not specs:
        raise ConfigError(f"plan: got no --policy, expected an attention pattern ({names})")
    patterns = []
    for policy in policies_of(specs):
        if not isinstance(policy, Pattern):
            kind = type(policy).__name__.lower()
            raise ConfigError(f"--policy {kind} is no attention pattern, expected one of {names}")
        patterns.append(policy)
    return patterns


def laid_out(
    name: str | None, grid: str | None, text: int | None, size: str | None
) -> tuple[Model | None, Grid, int]:
    """Return the model, if there is one, the grid of the image's tokens, and the number of other rows.

    Raises:
        ConfigError: neither a model nor a grid, or flags of both. Those of `load`, `Grid` and `rows_of`.
    """
    if name is None:
        if grid is None or size is not None:
            given = f"--size {size} without a model" if grid else "neither MODEL nor --grid"
            raise ConfigError(f"plan: got {given}, expected a model, or --grid such as 32x48x80")
        integer("--text", text or 0, least=0, most=MOST_TOKENS)
        sides = sides_of("--grid", grid)
        frames, height, width = (1, *sides)[-3:]
        return None, Grid(frames, height, width), text or 0
    if grid is not None or text is not None:
        flag = f"--grid {grid}" if grid else f"--text {text}"
        raise ConfigError(f"plan: got {flag} with the model {name}, expected one of the two")
    network = load(name)
    tokens, others = rows_of(network, network.codec.latent_shape(signal_shape(network, size)))
    return network, tokens, others


def signal_shape(model: Model, size: str | None) -> tuple[int, ...]:
    """Return the shape of a sample of the model, or of one of another size."""
    channels, *own = model.signal_shape
    return (channels, *(own if size is None else sides_of("--size", size, len(own))))


def sides_of(flag: str, text: str, *counts: int) -> tuple[int, ...]:
    """`32x48x80` as (32, 48, 80), `64x64` as (64, 64).

    Raises:
        ConfigError: not numbers, or not as many as there are axes.
    """
    expected = counts or (2, 3)
    sides = tuple(int(side) for side in text.split("x") if re.fullmatch(r"[1-9]\d{,9}", side, re.ASCII))
    if len(sides) not in expected or len(sides) != len(text.split("x")):
        examples = " or ".join("64x64" if count == 2 else "32x48x80" for count in expected)
        raise ConfigError(f"{flag} {text:.80}, expected positive sides such as {examples}")
    most = MOST_TOKENS if flag == "--grid" else LARGEST
    if prod(sides) > most:
        raise ConfigError(f"{flag} {text}: {prod(sides):,} in all, expected at most {most:,}")
    return sides


def queries_of(words: Sequence[str], grid: Grid) -> Mapping[str, Place]:
    """Return the tokens of `--query`, with a name for each.

    Raises:
        ConfigError: no such token, or one twice.
    """
    shape = grid.shape[grid.frames == 1 :]
    found: dict[str, Place] = {}
    for number, word in enumerate(words, 1):
        parts = word.split(",")
        at = tuple(int(part) for part in parts if re.fullmatch(r"\d{1,9}", part, re.ASCII))
        if (
            len(at) != len(parts)
            or len(at) != len(shape)
            or any(a >= n for a, n in zip(at, shape, strict=True))
        ):
            raise ConfigError(
                f"--query {word}, expected {len(shape)} numbers below {', '.join(map(str, shape))}, such as "
                + ",".join(str(n // 2) for n in shape)
            )
        frame, row, column = (0, *at)[-3:]
        if (frame, row, column) in found.values():
            raise ConfigError(f"--query {word} is given twice, expected each token once")
        found[f"query {number}"] = (frame, row, column)
    return found


def underlay(model: Model | None, size: str | None, sample: bool, over: Path | None) -> Tensor | None:
    """Make the picture that `--sample` or `--over` asks for: uint8 [T, 1 or 3, H, W].

    Raises:
        ConfigError: the file cannot be read.
    """
    if sample:
        assert isinstance(model, Denoiser)
        shape = signal_shape(model, size)
        task = generating(model, "plan --sample")
        (shown,) = task.draw(generate(model, steps=SAMPLE_STEPS, guidance=1.0, shape=shape).samples)
        return shown if task.has_frames else shown[None]
    if over is None:
        return None
    try:
        pixels = read_square(over, PICTURE_PX)
    except DamagedImage as error:
        raise ConfigError(f"--over {over}: {error}") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
