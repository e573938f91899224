"""LiT: self-attention of a picture replaced by linear attention of few heads and a convolution (arXiv 2501.12976).

B batch, N heads of the model, H heads of linear attention, L rows, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.attention.pattern import sparse_sites
from ditkit.core.config import Count, Natural
from ditkit.core.errors import ConfigError, ShapeError, unknown
from ditkit.core.grid import Grid, image_of, sequence
from ditkit.core.inherit import Inherit
from ditkit.core.policy import Claim, Policy, Session, site_key
from ditkit.core.run import Call, Handler, Site
from ditkit.nn.linear_attention import ValueConv, linear_attention, regrouped

HEADS = {"S": 2, "B": 3, "L": 4, "XL": 4}
"""Heads of the paper's sizes; those of B and L are from memory."""
Feature = Literal["relu", "gelu", "softmax"]
FEATURES: Mapping[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}
WITHOUT_ATTENTION = Inherit(skip=("blocks.*.attn.*",))
"""The weights that a LiT takes from a trained DiT: all but those of attention, its output's layer among them."""


@dataclass(frozen=True)
class ReluLinear(Policy):
    """O = phi(Q) (phi(K)^T V) / (phi(Q) sum phi(K)) + DWC(V), before the output's layer; phi is ReLU.

    The convolution reads the grid, so rows stay in their order: no pattern and no token selector goes with it. A model
    trained so cannot do without. Attention to text, of PixArt, stays as it is.

    Args:
        heads: of linear attention, which divide the width; few, as they cost multiplications but hardly time.
        kernel: side of the depth-wise convolution of the values, odd; 0 for none.
        shared: one filter for each channel of a head, in all heads alike.
        phi: "gelu" for the paper's ablation; "softmax" leaves the model's attention as it is: the neutral setting.
    """

    inherent: ClassVar[bool] = True
    heads: Count = 2
    kernel: Natural = 5
    shared: bool = False
    phi: Feature = "relu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel and self.kernel % 2 == 0:
            raise ConfigError(f"ReluLinear: kernel={self.kernel} should be odd, or 0 for none")

    @classmethod
    def preset(cls, name: str) -> Self:
        """Return the setting for a DiT of the paper's: S/2, B/2, L/2 or XL/2.

        Raises:
            ConfigError: the name is none of them.
        """
        names = {f"{size}/2": heads for size, heads in HEADS.items()}
        if name not in names:
            raise ConfigError(unknown("LiT preset", name, names))
        return cls(heads=names[name])

    def claims(self, sites: Sequence[Site]) -> Mapping[str, Claim]:
        cores = [site.name for site in self.cores(sites)]
        if self.phi == "softmax":
            return dict.fromkeys(cores, "see")
        return dict.fromkeys(("rows", *cores), "own")

    def cores(self, sites: Sequence[Site]) -> list[Site]:
        """List the attentions among rows of the picture alone.

        Raises:
            ConfigError: the width of one does not divide into the heads, or is not known.
        """
        image = {name for name, stream in sparse_sites(sites).items() if stream == "image"}
        found = [site for site in sites if site.name in image]
        for site in found:
            if not site.width or site.width % self.heads:
                raise ConfigError(
                    f"ReluLinear: {site.name!r} of width {site.width} does not divide into heads={self.heads}"
                )
        return found

    def modules(self, sites: Sequence[Site]) -> nn.ModuleDict | None:
        if self.phi == "softmax" or not self.kernel:
            return None
        return nn.ModuleDict(
            {
                site_key(site.name): ValueConv(site.width, self.heads, self.kernel, self.shared)
                for site in self.cores(sites)
            }
        )

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> Session:
        own = self.modules(sites) if modules is None else modules
        return Linear(self, self.cores(sites), own)

    def exact(self) -> Self:
        return replace(self, phi="softmax")


class Linear(Session):
    """Linear attention in every call; it keeps nothing between calls."""

    verb: ClassVar[str] = "linear"

    def __init__(self, policy: ReluLinear, cores: Sequence[Site], modules: Any) -> None:
        super().__init__()
        self.policy, self.cores, self.modules = policy, cores, modules

    def enter(self, call: Call) -> Mapping[str, Handler]:
        if self.policy.phi == "softmax":
            return {}
        handlers = {}
        for site in self.cores:
            conv = self.modules[site_key(site.name)] if self.policy.kernel else None
            handlers[site.name] = partial(attend, self.policy, conv, grid_of(call, site.stage))
        return handlers


def grid_of(call: Call, stage: int) -> Grid:
    """Return the grid of a call's picture.

    Raises:
        ConfigError: it is a clip, or other rows stand in its sequence.
    """
    image = image_of(call.layout, stage)
    if image.grid.frames > 1 or len(sequence(call.layout, "image", stage)) > 1:
        streams = [segment.stream for segment in call.layout]
        raise ConfigError(
            f"ReluLinear: a sequence of {streams} with {image.grid.frames} frames, expected the rows of one picture"
        )
    return image.grid


def attend(
    policy: ReluLinear,
    conv: ValueConv | None,
    grid: Grid,
    fn: Handler,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *masks: Tensor | None,
) -> Tensor:
    """Attend linearly in the place of a core: [B, N, L, K] in and out, grouped into few heads in between.

    Raises:
        ShapeError: rows are masked, or there are others than the grid's.
    """
    if any(mask is not None for mask in masks):
        raise ShapeError("ReluLinear: attention with a mask, expected all rows of a picture")
    if q.shape[2] != grid.length or k.shape[2] != grid.length:
        raise ShapeError(
            f"ReluLinear: {q.shape[2]} queries and {k.shape[2]} keys on a grid of {grid.length} tokens"
        )
    phi, before = FEATURES[policy.phi], q.shape[1]
    q, k, v = (regrouped(x, policy.heads) for x in (q, k, v))
    out = linear_attention(phi(q), phi(k), v)
    return regrouped(out if conv is None else out + conv(v, grid), before)
