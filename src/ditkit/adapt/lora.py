"""LoRA (arXiv 2106.09685) through peft: low-rank updates of linear layers, trained beside them, merged, or kept apart.

An adapter's file says which base it was trained on, and goes on no other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from ditkit.core.checkpoint import read_metadata, read_state, write_state
from ditkit.core.codec import fingerprint
from ditkit.core.errors import CheckpointError, ConfigError, ConflictError, unknown
from ditkit.core.transform import Transform, described, transform_of

Layers = Literal["blocks", "attention", "qkv", "all"]
ADAPTER = "adapter.safetensors"
NAME = "default"
"""peft's name of the adapter."""
QKV = ("qkv", "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
"""Layers of attentions that make queries, keys and values: ours, fused, and those of diffusers."""
BASE = ".base_layer"
"""Under which peft keeps the layer that it wraps."""


@dataclass(frozen=True)
class LoRA(Transform):
    """y = W x + (alpha / rank) B A x, where A is drawn and B is 0, so that nothing changes at first.

    Args:
        rank: of the update; 0 for none. alpha: its scale, times rank.
        layers: linear layers that get one: those in blocks, those of attention in blocks, of these alone the ones that
            make queries, keys and values ("qkv"), or all.
        seed: of A.
        dropout: of what goes into A, in training.
        bias: also train the biases of these layers (peft's "lora_only").
    """

    rank: int = 8
    alpha: float = 8.0
    layers: Layers = "blocks"
    seed: int = 0
    dropout: float = 0.0
    bias: bool = False

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 0:
            raise ConfigError(f"LoRA: rank={self.rank!r}, expected an integer of at least 0")
        if not self.alpha > 0:
            raise ConfigError(f"LoRA: alpha={self.alpha}, expected a positive number")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"LoRA: dropout={self.dropout}, expected a number in [0, 1)")
        if self.layers not in get_args(Layers):
            raise ConfigError("LoRA: " + unknown("layers", self.layers, get_args(Layers)))

    def check(self, model: Any) -> None:
        _peft()
        if any(isinstance(t, LoRA) for t in model.transforms):
            raise ConflictError(
                "LoRA: the model has one already; merge it first (Merged()), or go on training it"
            )
        found = _candidates(model, self.layers)
        if not found:
            raise ConfigError(
                f"LoRA: layers={self.layers!r} names no linear layer of this {type(model).__name__}, expected one of "
                f"{', '.join(get_args(Layers))} that does"
            )
        if other := [(name, layer) for name, layer in found if type(layer) is not nn.Linear]:
            name, layer = other[0]
            raise ConflictError(
                f"LoRA: {name!r} is a {type(layer).__name__}, which peft cannot wrap; apply LoRA before what made it so"
            )
        least = min(min(layer.in_features, layer.out_features) for _, layer in found)
        if self.rank > least:
            raise ConfigError(
                f"LoRA: rank={self.rank}, expected at most {least}, the narrowest layer's width"
            )

    def shape(self, model: Any) -> Any:
        peft, targets = _peft(), [name for name, _ in _candidates(model, self.layers)]
        if not self.rank:
            return model
        trained = {id(p): p.requires_grad for p in model.parameters()}
        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            bias="none",
            target_modules=targets,
        )
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self.seed)
            peft.inject_adapter_in_model(config, model, NAME)
        for parameter in model.parameters():  # peft freezes the base; a run's groups decide that
            parameter.requires_grad_(trained.get(id(parameter), True))
        return model

    def apply(self, model: Any, calibration: Any = None) -> tuple[Any, Mapping[str, Any]]:
        self.shape(model)
        return model, {
            "layers": len(_layers(model)),
            "parameters": sum(p.numel() for p in _own(model).values()),
        }

    def origin(self, name: str) -> str:
        return name.replace(BASE, "")

    def trains(self, model: Any) -> list[str]:
        biases = [
            f"{name}{BASE}.bias"
            for name, m in model.named_modules()
            if _is_layer(m) and m.base_layer.bias is not None
        ]
        return [*_own(model), *(biases if self.bias else ())]

    def ready(self, model: Any) -> None:
        if any(layer.merged for layer in _layers(model)):
            raise ConfigError(
                "LoRA: its updates are merged for now; save it after `merged`, or apply Merged()"
            )

    @classmethod
    def small(cls, model: Any) -> tuple[Transform, ...]:
        return (cls(rank=2),)

    def exact(self) -> LoRA:
        return replace(self, rank=0)


@dataclass(frozen=True)
class Merged(Transform):
    """LoRA's updates added to the weights, and its layers taken away: W + (alpha / rank) B A.

    Args:
        on: whether; False is the neutral setting.
    """

    undoes: ClassVar[tuple[type[Transform], ...]] = (LoRA,)
    on: bool = True

    def check(self, model: Any) -> None:
        if not any(isinstance(t, LoRA) for t in model.transforms):
            raise ConflictError("Merged: the model has no LoRA to merge; apply it after one")

    def shape(self, model: Any) -> Any:
        for name, module in list(model.named_modules()):
            if _is_layer(module):
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, module.base_layer)
        vars(model).pop("peft_config", None)
        return model

    def apply(self, model: Any, calibration: Any = None) -> tuple[Any, Mapping[str, Any]]:
        layers = _layers(model)
        for layer in layers:
            layer.merge()
        return self.shape(model), {"layers": len(layers)}

    def plain(self, model: Any) -> Mapping[str, Any] | None:
        return {}

    @classmethod
    def small(cls, model: Any) -> tuple[Transform, ...]:
        return (LoRA(rank=2), cls())

    def exact(self) -> Merged:
        return replace(self, on=False)


@contextmanager
def merged(model: Any) -> Iterator[None]:
    """Inside, the updates are in the weights, and a layer costs what it did before; afterwards apart again, to the bit.

    Raises:
        ConfigError: the model has no LoRA.
    """
    layers = _layers(model)
    if not layers:
        raise ConfigError(f"merged: this {type(model).__name__} has no LoRA, expected one")
    before = [layer.base_layer.weight.detach().clone() for layer in layers]
    try:
        for layer in layers:
            layer.merge()
        yield
    finally:
        for layer, weight in zip(layers, before, strict=True):
            if layer.merged:
                layer.unmerge()
            with torch.no_grad():
                layer.base_layer.weight.copy_(weight)  # subtracting again would leave a rounding


def save_adapter(model: Any, folder: str | Path) -> Path:
    """Save the low-rank weights alone, with the setting and the digest of the base that they were trained on.

    Raises:
        ConfigError: the model has no LoRA, or the folder cannot be written.
    """
    lora = next((t for t in model.transforms if isinstance(t, LoRA)), None)
    if lora is None:
        raise ConfigError(f"save_adapter: this {type(model).__name__} has no LoRA, expected one")
    lora.ready(model)
    if lora.bias:
        raise ConfigError("save_adapter: bias=True trained biases of the base, too; save the model itself")
    about = {"transform": json.dumps(described(lora)), "base_sha256": base_digest(model)}
    write_state(Path(folder) / ADAPTER, _own(model), about)
    return Path(folder)


def load_adapter(model: Any, folder: str | Path) -> None:
    """Apply an adapter of `save_adapter` to the base that it was trained on, in place.

    Raises:
        CheckpointError: it is damaged, or was trained on another base. ConflictError: the model has a LoRA.
    """
    path = Path(folder) / ADAPTER
    state, about = read_state(path), read_metadata(path)
    try:
        lora = transform_of(json.loads(about["transform"]), path)
        wanted = about["base_sha256"]
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} does not say its LoRA and its base") from error
    given = base_digest(model)
    if given != wanted:
        raise CheckpointError(f"{path} is an adapter for the base {wanted[:16]}, the model is {given[:16]}")
    trial = model.rebuilt((*model.transforms, lora))
    wanted_shapes = {name: tuple(weight.shape) for name, weight in _own(trial).items()}
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    if shapes != wanted_shapes:
        name = next(n for n in {**wanted_shapes, **shapes} if wanted_shapes.get(n) != shapes.get(n))
        raise CheckpointError(f"{path}: {name!r} is {shapes.get(name)}, expected {wanted_shapes.get(name)}")
    if spoiled := [name for name, value in state.items() if not value.isfinite().all()]:
        raise CheckpointError(f"{path}: tensor {spoiled[0]!r} holds NaN or infinity")
    model.transform(lora)
    with torch.no_grad():
        for name, weight in _own(model).items():
            weight.copy_(state[name])


def base_digest(model: Any) -> str:
    """Digest all tensors but the low-rank ones, under the names that they had without them."""
    own = set(_own(model))
    base = {k.replace(BASE, ""): v for k, v in model.state_dict().items() if k not in own}
    return fingerprint(base)


def _candidates(model: nn.Module, layers: Layers) -> list[tuple[str, Any]]:
    """Layers that take a vector to a vector, by structure: they have in_features and out_features."""
    paths = [stack.path + "." for stack in model.stacks().values()]  # type: ignore[operator]
    of_attention = [name + "." for name, module in model.named_modules() if hasattr(module, "heads")]
    found = [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "in_features") and not name.startswith("learned.") and not _is_layer(module)
    ]
    inner = [name for name, module in model.named_modules() if hasattr(module, "in_features")]
    outermost = [(n, m) for n, m in found if not any(n.startswith(other + ".") for other in inner)]
    if layers == "all":
        return outermost
    inside = [(n, m) for n, m in outermost if any(n.startswith(path) for path in paths)]
    if layers == "blocks":
        return inside
    if layers == "qkv":
        inside = [(n, m) for n, m in inside if n.rpartition(".")[2] in QKV]
    return [(n, m) for n, m in inside if any(n.startswith(attention) for attention in of_attention)]


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if _is_layer(module)]


def _is_layer(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "lora_A")


def _own(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the low-rank weights, by name."""
    return {
        f"{name}.{inner}": weight
        for name, module in model.named_modules()
        if _is_layer(module)
        for inner, weight in module.named_parameters()
        if inner.startswith(("lora_A.", "lora_B."))
    }


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError("LoRA needs peft: pip install 'ditkit[hosts]'") from error
    return peft
