"""Blocks with less in them: an MLP that became one linear layer, a text stream that became projections (PPCL).

B batch, L image rows, S text rows, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ditkit.core.errors import ConfigError
from ditkit.core.run import DIRECT, Run, Site
from ditkit.nn.blocks import Block, everything
from ditkit.nn.modulation import Parts, activated, affine, gate, modulate
from ditkit.nn.rotary import Rotary

Role = Literal["own", "handed", "read", "resumed"]
"""The text of a block: its own; its own, whose modulated rows are handed on; those, read; or read for the last time."""


class Halved(nn.Module):
    """A modulation without the MLP's parts, in whose place are those that change nothing: shift 0, scale 0, gate 1.

    Args:
        wide: the modulation that it replaces, D to 6 D or, where the image attends to itself again, to 9 D.
    """

    def __init__(self, wide: nn.Linear) -> None:
        super().__init__()
        width = wide.in_features
        self.linear = linear_like(wide, width, wide.out_features - 3 * width)

    def take(self, wide: nn.Linear) -> None:
        """Copy the parts that stay."""
        D = self.linear.in_features
        for own, other in zip(self.linear.parameters(), wide.parameters(), strict=True):
            own.data.copy_(torch.cat([other.data[: 3 * D], other.data[6 * D :]]))

    def forward(self, c: Tensor) -> Tensor:
        parts = self.linear(c)
        D = self.linear.in_features
        nothing = parts.new_zeros(*parts.shape[:-1], 2 * D)
        return torch.cat(
            [parts[..., : 3 * D], nothing, torch.ones_like(nothing[..., :D]), parts[..., 3 * D :]], -1
        )


class LinearBlock(nn.Module):
    """A block of DiT whose MLP is one linear layer on the state: x + a1 Attn(mod(LN x)), then x + F x.

    Args:
        block: whose attention it keeps.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        width = block.norm.normalized_shape[0]
        self.norm, self.attn = block.norm, block.attn
        self.linear = linear_like(block.modulation, width, width)
        self.modulation = linear_like(block.modulation, width, 3 * width)

    @classmethod
    def of(cls, block: Block) -> Self:
        """Take over a block, with the values that stay."""
        new = cls(block)
        for own, other in zip(new.modulation.parameters(), block.modulation.parameters(), strict=True):
            own.data.copy_(other.data[: len(own)])
        return new

    def attend(
        self, run: Run, at: str, x_BLD: Tensor, parts: Parts | Tensor, rotary: Rotary | None = None
    ) -> Tensor:
        """Compute the attention branch before its gate."""
        route = run.site(at + ".route", everything, x_BLD, self.attn.qkv, self.attn.out)
        h_BLD = modulate(self.norm(x_BLD), *affine(parts, 0, 1))
        return self.attn(h_BLD, run, at, rotary, route=route)

    def feed(self, x_BLD: Tensor) -> Tensor:
        """Compute what is added in the place of the MLP, row by row."""
        out: Tensor = self.linear(x_BLD)
        return out

    def forward(
        self,
        x_BLD: Tensor,
        c_BD: Tensor,
        rotary: Rotary | None = None,
        run: Run = DIRECT,
        at: str = "blocks.0",
    ) -> Tensor:
        aligned = () if rotary is None else (rotary,)
        attn = at + ".attn"
        parts = run.site(at + ".modulation", partial(Parts, self.modulation), activated(c_BD))
        branch = run.site(attn, partial(self.attend, run, attn), x_BLD, parts, *aligned)
        x_BLD = torch.addcmul(x_BLD, gate(parts, 0, 1), branch)
        return x_BLD + run.site(at + ".mlp", self.feed, x_BLD)

    def sites(self, at: str, stream: str = "image", stage: int = 0) -> list[Site]:
        """Its sites in the order of the call."""
        site = partial(Site, stream=stream, width=self.linear.in_features, stage=stage)
        return [
            site(at, "block"),
            site(f"{at}.modulation", "modulation"),
            site(f"{at}.attn", "branch"),
            site(f"{at}.attn.route", "choice", heads=self.attn.heads),
            *self.attn.sites(f"{at}.attn", stream, stage),
            site(f"{at}.mlp", "branch"),
        ]


class TwoStreams:
    """Base of a block of an image and a text that meet in its attention, which can do without its text or its MLPs.

    A group of blocks whose text hardly changes computes it once (PPCL, section C1): the first of them hands on, beside
    its text h [B, S, D], the modulated rows z that its attention read, so that what goes from block to block in the
    text's place is [B, S, 2 D]. Each of the others reads P z + z; the last gives Q h + h, the text from there on.
    """

    mlps: ClassVar[Mapping[str, tuple[str, str, str]]] = {}
    """By stream, the names of the layer that modulates, of the norm before the MLP, and of the MLP."""
    of_text: ClassVar[tuple[str, ...]] = ()
    """Names of all that is the text's alone, beside the attention."""
    text_role: Role = "own"

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    @property
    def owns_text(self) -> bool:
        """Return whether it computes a text of its own."""
        return self.text_role in ("own", "handed")

    def lose_text(self, role: Role) -> None:
        """Change what it does with the text, leaving fresh projections to be filled."""
        self.text_role = role
        if self.owns_text:
            return
        like: Any = next(m for m in self.modules() if isinstance(m, nn.Linear))
        for name in self.of_text:
            setattr(self, name, None)
        self.text_proj = linear_like(like, self.text_width, self.text_width)
        if role == "resumed":
            self.text_resume = linear_like(like, self.text_width, self.text_width)

    @property
    def text_width(self) -> int:
        """Channels of the text's rows."""
        attn: Any = self.attn
        return int(attn.add_k_proj.in_features)

    def normed_text(self, text: Tensor) -> Tensor:
        """Return the norm before the attention of the text's rows."""
        raise NotImplementedError

    def split_text(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """Return the text's state and what its attention reads of it, [B, S, D] each."""
        if self.owns_text:
            return given, given
        state, rows = given.chunk(2, -1)
        return state, rows

    def text_rows(self, rows: Tensor, *by: Tensor) -> Tensor:
        """Return the text's rows as the attention reads them: normed and modulated by shift and scale, or P z + z."""
        return modulate(self.normed_text(rows), *by) if self.owns_text else rows + self.text_proj(rows)

    def hand_text(self, text: Tensor, before: Tensor, *by: Tensor) -> Tensor:
        """Return what the next block is given of a text that it owns."""
        return text if self.text_role == "own" else torch.cat([text, self.text_rows(before, *by)], -1)

    def pass_text(self, run: Run, at: str, given: Tensor) -> Tensor:
        """Return what the next block is given of a text that it does not own: the same, or Q h + h."""
        if self.text_role == "read":
            return given
        state = given.chunk(2, -1)[0]
        return state + run.site(at + ".text.out", self.text_resume, state)

    def text_sites(self, at: str) -> list[Site]:
        """List the sites of its text after those of the image."""
        if self.owns_text:
            return [Site(f"{at}.text.mlp", "branch", "text")]
        return [Site(f"{at}.text.out", "branch", "text")] if self.text_role == "resumed" else []


def text_sites(block: Any, at: str) -> list[Site]:
    """List the sites of a block's text after those of the image; a block that is not viewed has its own text."""
    return (
        block.text_sites(at) if isinstance(block, TwoStreams) else [Site(f"{at}.text.mlp", "branch", "text")]
    )


def lost_text(model: nn.Module) -> bool:
    """Return whether a block of a model shares another's text."""
    return any(isinstance(m, TwoStreams) and m.text_role != "own" for m in model.modules())


def linear_mlps(block: Any) -> dict[str, nn.Linear]:
    """Return the linear layers that stand in the place of a block's MLPs, by stream."""
    if isinstance(block, LinearBlock):
        return {"image": block.linear}
    return {stream: block.get_submodule(mlp) for stream, (_, _, mlp) in streams_of(block).items()}


def streams_of(block: Any) -> Mapping[str, tuple[str, str, str]]:
    """Return the names of the MLPs of the streams that a block still computes."""
    return {
        stream: names
        for stream, names in block.mlps.items()
        if stream == "image" or (block.owns_text and getattr(block, names[2]) is not None)
    }


def check_linear(block: nn.Module, name: str) -> None:
    """Refuse a block whose MLP cannot become a linear layer.

    Raises:
        ConfigError: it has no MLP behind its attention, or one already.
    """
    if isinstance(block, LinearBlock) or (isinstance(block, TwoStreams) and _is_linear(block)):
        raise ConfigError(f"{name} has a linear layer in the place of its MLP already")
    if type(block) is not Block and not isinstance(block, TwoStreams):
        raise ConfigError(
            f"{name} is a {type(block).__name__}, expected a block whose MLP follows its attention: DiT's, or one of "
            "two streams of diffusers"
        )


def with_linear_mlps(block: Any) -> Any:
    """Return a block with linear layers, yet to be filled, in the place of its MLPs; the others are its own."""
    if type(block) is Block:
        return LinearBlock.of(block)
    for modulation, norm, mlp in streams_of(block).values():
        wide: Any = block.get_submodule(modulation)
        half = Halved(wide)
        half.take(wide)
        for name, part in (
            (modulation, half),
            (norm, nn.Identity()),
            (mlp, linear_like(wide, wide.in_features)),
        ):
            parent, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(parent), leaf, part)
    return block


def _is_linear(block: TwoStreams) -> bool:
    return isinstance(block.get_submodule(block.mlps["image"][2]), nn.Linear)


def linear_like(other: nn.Linear, ins: int, outs: int | None = None) -> nn.Linear:
    """Return a layer, yet to be filled, on the device and of the type of another."""
    weight = other.weight
    layer: nn.Linear = skip_init(nn.Linear, ins, outs or ins, device=weight.device, dtype=weight.dtype)
    return layer
