"""Transforms that swap layers: whole numbers for weights, MLPs of two low-rank layers, a pack of affine maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.core.errors import ConflictError
from ditkit.core.transform import Transform
from ditkit.nn.blocks import Mlp


def swap(
    root: nn.Module, accepts: Callable[[nn.Module], bool], make: Callable[[Any], nn.Module]
) -> dict[str, nn.Module]:
    """Replace modules by class and structure; the old ones by name."""
    found = {name: module for name, module in root.named_modules() if accepts(module)}
    for name, module in found.items():
        parent, _, leaf = name.rpartition(".")
        setattr(root.get_submodule(parent), leaf, make(module))
    return found


class Int8Linear(nn.Module):
    def __init__(self, old: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, like = old.in_features, old.out_features, old.weight.device
        self.register_buffer(
            "whole", torch.zeros(self.out_features, self.in_features, dtype=torch.int8, device=like)
        )
        self.register_buffer("scale", torch.zeros(self.out_features, 1, device=like))
        self.bias = None if old.bias is None else nn.Parameter(torch.zeros(self.out_features, device=like))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.whole.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def quantised(model: Any) -> dict[str, nn.Module]:
    """Every linear layer but those that an earlier transform trains, as `Int8Linear`; the old ones by name."""
    own = {id(model.get_parameter(name)) for t in model.transforms for name in t.trains(model)}
    return swap(model, lambda m: is_linear(m) and id(m.weight) not in own, Int8Linear)


def is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear


@dataclass(frozen=True)
class ToyInt8(Transform):
    bits: int = 8

    def shape(self, model: Any) -> Any:
        quantised(model)
        return model

    def apply(self, model: Any, calibration: Any = None) -> tuple[Any, Mapping[str, Any]]:
        old = quantised(model)
        with torch.no_grad():
            for name, layer in old.items():
                new = model.get_submodule(name)
                scale = layer.weight.abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
                new.whole.copy_((layer.weight / scale).round().to(torch.int8))
                new.scale.copy_(scale)
                if layer.bias is not None:
                    new.bias.copy_(layer.bias)
        return model, {"layers": len(old)}

    def exact(self) -> ToyInt8:
        return replace(self, bits=32)


ToyInt8.keeps = (".scale",)


class LowRank(nn.Module):
    """W = U V, as one layer."""

    def __init__(self, old: nn.Linear, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features, like = old.in_features, old.out_features, old.weight.device
        self.down = nn.Linear(self.in_features, rank, bias=False, device=like)
        self.up = nn.Linear(rank, self.out_features, device=like)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


@dataclass(frozen=True)
class ToyLowRank(Transform):
    """The MLPs' layers by their largest singular values."""

    rank: int = 4

    def check(self, model: Any) -> None:
        if not any(isinstance(m, Mlp) and is_linear(m.inner) for m in model.modules()):
            raise ConflictError("ToyLowRank: no MLP of plain layers is left")

    def shape(self, model: Any) -> Any:
        return self.apply(model)[0]

    def apply(self, model: Any, calibration: Any = None) -> tuple[Any, Mapping[str, Any]]:
        mlps = [m for m in model.modules() if isinstance(m, Mlp)]
        with torch.no_grad():
            for mlp in mlps:
                for name, layer in swap(mlp, is_linear, lambda old: LowRank(old, self.rank)).items():
                    if layer.weight.is_meta:
                        continue
                    new, (u, s, v) = getattr(mlp, name), torch.linalg.svd(layer.weight, full_matrices=False)
                    new.up.weight.copy_(u[:, : self.rank] * s[: self.rank])
                    new.down.weight.copy_(v[: self.rank])
                    new.up.bias.copy_(layer.bias)
        return model, {"mlps": len(mlps)}

    def exact(self) -> ToyLowRank:
        return replace(self, rank=0)


class Affine(nn.Module):
    """A layer's output scaled and shifted a channel."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        like = next(iter(layer.state_dict().values())).device
        self.in_features, self.out_features, self.layer = layer.in_features, layer.out_features, layer
        self.scale = nn.Parameter(torch.ones(layer.out_features, device=like))
        self.shift = nn.Parameter(torch.zeros(layer.out_features, device=like))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale + self.shift


@dataclass(frozen=True)
class ToyAffine(Transform):
    on: bool = True

    def shape(self, model: Any) -> Any:
        outer = {name for name, m in model.named_modules() if hasattr(m, "in_features")}
        names = [n for n in outer if not any(n.startswith(other + ".") for other in outer)]
        wanted = {id(model.get_submodule(n)) for n in names if n.startswith("blocks.")}
        swap(model, lambda m: id(m) in wanted, Affine)
        return model

    def origin(self, name: str) -> str:
        return name.replace(".layer.", ".")

    def trains(self, model: Any) -> list[str]:
        found = [n for n, m in model.named_modules() if isinstance(m, Affine)]
        return [f"{n}.{part}" for n in found for part in ("scale", "shift")]

    def exact(self) -> ToyAffine:
        return replace(self, on=False)


TOYS = (ToyInt8, ToyLowRank, ToyAffine)
for toy in TOYS:
    toy.__module__ = "ditkit.compress.toy"  # where config.json's names are looked for
