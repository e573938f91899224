"""What attention patterns are tested against: a mask of every pair in the model's own order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.attention import Band, Grouped, Neighbourhood
from ditkit.core.cond import Cond
from ditkit.core.convention import Convention
from ditkit.core.grid import Grid, image_of, sequence
from ditkit.core.policy import Claim, Policy, Session
from ditkit.core.run import Call, Handler, Site, attended
from ditkit.core.trajectory import Trajectory
from ditkit.models.video_dit import VideoDiT, VideoDiTConfig
from ditkit.ops.block_sparse_attention import BlockPlan

Meets = Callable[[Tensor, Tensor], Tensor]
"""`meets(query, key)`: whether tokens at (frame, row, column) [..., 3] see each other."""


@dataclass(frozen=True)
class Masked(Policy):
    """Dense attention under `meets`, token by token; others see all and are seen by all but where padding."""

    meets: Meets

    def claims(self, sites: Sequence[Site]) -> Mapping[str, Claim]:
        return dict.fromkeys(attended(sites), "own")

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> MaskedSession:
        return MaskedSession(self, attended(sites))

    def exact(self) -> Masked:
        raise NotImplementedError


class MaskedSession(Session):
    def __init__(self, policy: Masked, streams: Mapping[str, str]) -> None:
        super().__init__()
        self.policy, self.streams = policy, streams

    def enter(self, call: Call) -> Mapping[str, Handler]:
        return {name: partial(self.core, self.pairs(call, stream)) for name, stream in self.streams.items()}

    def pairs(self, call: Call, stream: str) -> Tensor:
        image, segments = image_of(call.layout), sequence(call.layout, stream)
        place = segments.index(image)
        others = [sum(s.length for s in part) for part in (segments[:place], segments[place + 1 :])]
        return F.pad(token_mask(image.grid, self.policy.meets), (*others, *others), value=True)

    def core(self, pairs: Tensor, fn: Handler, q: Tensor, k: Tensor, v: Tensor, *masks: Tensor) -> Tensor:
        for mask in masks:
            pairs = pairs & F.pad(mask, (0, k.shape[2] - mask.shape[-1]), value=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=pairs)


def circle_meets(pattern: Neighbourhood) -> Meets:
    """CLEAR's definition, token by token; in a clip a cylinder's."""

    def met(query: Tensor, key: Tensor) -> Tensor:
        t, y, x = (query - key).unbind(-1)
        return (y * y + x * x < pattern.radius**2) & (t.abs() < max(pattern.span, 1))

    return met


def grouped_meets(pattern: Grouped, is_clip: bool) -> Meets:
    """GRAT's definition, token by token."""

    def met(query: Tensor, key: Tensor) -> Tensor:
        sides = torch.tensor((1, *pattern.group)[-3:])
        apart = (query // sides - key // sides).abs()
        if pattern.meeting == "blocks":
            return (apart <= pattern.reach).all(-1)
        return (apart[..., 0 if is_clip else 1 :] == 0).any(-1)

    return met


def band_meets(pattern: Band, grid: Grid) -> Meets:
    """The definition of a band: places in the frame at most int(area keep) // 2 apart."""
    reach = int(grid.height * grid.width * pattern.keep) // 2

    def met(query: Tensor, key: Tensor) -> Tensor:
        places = [at[..., 1] * grid.width + at[..., 2] for at in (query, key)]
        return (places[0] - places[1]).abs() <= reach

    return met


def token_mask(grid: Grid, meets: Meets) -> Tensor:
    """Every pair of tokens of a grid, bool [L, L]."""
    at = grid.coordinates()
    return meets(at[:, None], at)


def planned_mask(plan: BlockPlan) -> Tensor:
    """Every pair of tokens that a plan lets see each other, in the model's order: bool [tokens, tokens]."""
    (pairs,) = plan.mask().flatten(0, 1)
    return pairs[plan.inverse][:, plan.inverse]


def tiny_clip_model(text: int = 0, **sizes: object) -> VideoDiT:
    """A VideoDiT of random weights everywhere in float64, with `text` rows of a prompt before the clip."""
    given = {"frames": 4, "size": (12, 20), "patch": 2, "width": 24, "depth": 2, "heads": 2, "channels": 2}
    config = VideoDiTConfig(
        **{**given, **sizes},  # type: ignore[arg-type]
        text_tokens=text,
        text_width=6 if text else 0,
        convention=Convention(),
    )
    model = VideoDiT(config).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


def predicted(
    model: VideoDiT,
    policy: Policy | None,
    x: Tensor,
    cond: Cond,
    total: int = 4,
    index: int = 0,
    learned: nn.ModuleDict | None = None,
) -> Tensor:
    """One evaluation at t = 0.5 of a trajectory of `total`."""
    call = Call(index, total, 0.5, layout=model.layout(tuple(x.shape[1:])))
    trajectory = Trajectory(model.sites(), [policy] if policy else [], total, learned=learned)
    with torch.no_grad():
        return trajectory.leave(
            call, model(x, torch.full((len(x),), 0.5).double(), cond, trajectory.run(call))
        )


def prompt(batch: int, real: tuple[int, ...]) -> Cond:
    """Text of 7 rows, of which the first `real` of each sample are no padding."""
    text = torch.randn(batch, 7, 6, generator=torch.Generator().manual_seed(2)).double()
    return Cond(text=text, text_mask=torch.arange(7) < torch.tensor(real)[:, None])
