"""Two policies that models are trained under: blocks masked by the noise-time, and a learned map beside attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ditkit.core.errors import ConfigError
from ditkit.core.policy import Claim, Policy, Session, site_key
from ditkit.core.run import Call, Handler, Site, named


@dataclass(frozen=True)
class Routing(Policy):
    """A block computes a window of its channels, which moves with the noise-time of the sample (after DTR)."""

    inherent = True
    share: float = 0.5

    def claims(self, sites: Sequence[Site]) -> Mapping[str, Claim]:
        return dict.fromkeys(named(sites, "block"), "wrap")

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> Session:
        return Routed(self, {site.name: site.width for site in sites if site.kind == "block"})

    def exact(self) -> Routing:
        return replace(self, share=1.0)


class Routed(Session):
    def __init__(self, policy: Routing, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.policy, self.widths = policy, widths

    def enter(self, call: Call) -> Mapping[str, Handler]:
        if self.policy.share == 1:
            return {}
        return {name: partial(self.block, call.times, width) for name, width in self.widths.items()}

    def block(self, times: Tensor, width: int, fn: Any, x: Tensor, *args: Any) -> Tensor:
        kept = round(width * self.policy.share)
        start = ((width - kept) * times).round()[:, None]
        channels = torch.arange(width, device=x.device)
        mask = ((channels >= start) & (channels < start + kept)).to(x.dtype)[:, None]
        return x + mask * (fn(x * mask, *args) - x * mask)


class Map(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, width))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q.softmax(-1), k.softmax(-1)
        return (q @ (k.mT @ v)) / k.shape[2] @ self.weight


@dataclass(frozen=True)
class Mapped(Policy):
    """A linear attention through a learned map is added to each core (after SLA)."""

    inherent = True
    off: bool = False

    def claims(self, sites: Sequence[Site]) -> Mapping[str, Claim]:
        return dict.fromkeys(named(sites, "core"), "wrap")

    def modules(self, sites: Sequence[Site]) -> nn.ModuleDict:
        cores = [site for site in sites if site.kind == "core"]
        if silent := [site.name for site in cores if not site.heads]:
            raise ConfigError(f"Mapped: {silent[0]!r} does not say its heads")
        return nn.ModuleDict({site_key(site.name): Map(site.width // site.heads) for site in cores})

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> Session:
        return Maps(self, named(sites, "core"), self.modules(sites) if modules is None else modules)

    def exact(self) -> Mapped:
        return replace(self, off=True)


class Maps(Session):
    def __init__(self, policy: Mapped, names: Sequence[str], modules: Any) -> None:
        super().__init__()
        self.policy, self.names, self.modules = policy, names, modules

    def enter(self, call: Call) -> Mapping[str, Handler]:
        if self.policy.off:
            return {}
        return {name: partial(self.core, self.modules[site_key(name)]) for name in self.names}

    def core(self, learned: Map, fn: Any, q: Tensor, k: Tensor, v: Tensor, *masks: Tensor) -> Tensor:
        return fn(q, k, v, *masks) + learned(q, k, v)


for policy in (Routing, Mapped):
    policy.__module__ = "ditkit.adapt.toy"  # where config.json's names are looked for
