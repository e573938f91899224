"""Parts of a network: the weights that are trained, alone or in groups; the others are frozen.

A part is found by class and structure, or by the name of the transform, policy or term that its weights belong to.
"""

from __future__ import annotations

from torch import nn

from ditkit.core.errors import ConfigError, unknown
from ditkit.core.model import Model
from ditkit.nn.blocks import Attention, RMSNorm

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, RMSNorm, nn.modules.batchnorm._BatchNorm)
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Layers of the attentions of diffusers, which are known by them."""
PART = "part."
"""The prefix of the names of weights of terms' modules."""


def train_only(model: Model, trained: str) -> None:
    """Freeze what is in none of the parts that `trained` joins by "+".

    Args:
        trained: "attention" is the projections to queries, keys and values and that of the output, without norms, and
            what policies train of their own (CLEAR, arXiv 2412.16112). A network has parts of its own (`Model.parts`).

    Raises:
        ConfigError: a part is unknown, or the model has none of it, or its weights cannot be trained.
    """
    _refuse_fixed(model, trained)
    if trained == "all":
        return
    chosen = {name for part in trained.split("+") for name in part_of(model, part)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def part_of(model: Model, part: str, modules: nn.ModuleDict | None = None) -> set[str]:
    """Names of the weights of a part; those of terms' modules begin with "part.TERM.".

    Raises:
        ConfigError: it is unknown, or empty.
    """
    modules = nn.ModuleDict() if modules is None else modules
    learned = {f"learned.{name}" for name, _ in model.learned.named_parameters()}
    own = {f"{PART}{name}" for name, _ in modules.named_parameters()}
    attention = _inside(model, (Attention,), ("qkv", "out")) | _projections(model)
    added: dict[str, set[str]] = {}
    for transform in model.transforms:  # one may be there for each stack
        added.setdefault(type(transform).__name__.lower(), set()).update(transform.trains(model))
    parts = {
        "all": {name for name, _ in model.named_parameters()},
        "attention": attention and attention | learned,
        "norms": _inside(model, NORMS),
        "learned": learned,
        **(model.parts() if isinstance(model, Model) else {}),
        "parts": own,
        **added,
        **{type(p).__name__.lower(): _under(f"learned.{type(p).__name__}.", learned) for p in model.policies},
        **{term.lower(): _under(f"{PART}{term}.", own) for term in modules},
    }
    if part.lower() not in parts:
        raise ConfigError(f"training: {unknown('part', part, parts)}")
    if not parts[part.lower()]:
        raise ConfigError(f"trained={part!r}: a {type(model).__name__} has none that can be told apart")
    return parts[part.lower()]


def _refuse_fixed(model: Model, trained: str) -> None:
    """Refuse to train layers of which a transform left whole numbers, as if they were trained."""
    wanted = {"all", "attention"} & set(trained.lower().split("+"))
    transforms = getattr(model, "transforms", ())  # a codec, which is trained here too, has none
    held = [(name, type(t).__name__) for t in transforms for name in t.fixed(model)]
    if wanted and held:
        name, by = held[0]
        raise ConfigError(
            f"training: trained={trained!r}: {name!r} and {len(held) - 1} other layers are whole numbers by {by}, "
            "which are not trained; train adapters that were applied before it: trained='lora'"
        )


def _under(prefix: str, names: set[str]) -> set[str]:
    return {name for name in names if name.startswith(prefix)}


def _projections(model: nn.Module) -> set[str]:
    """Weights of the projections of attentions of diffusers; the norms of queries and keys are none."""
    return {
        f"{at}.{layer}.{name}"
        for at, module in model.named_modules()
        if hasattr(module, PROJECTIONS[0])
        for layer in PROJECTIONS
        if isinstance(part := getattr(module, layer, None), nn.Module)
        for name, _ in part.named_parameters()
    }


def _inside(
    model: nn.Module, kinds: tuple[type[nn.Module], ...], layers: tuple[str, ...] = ("",)
) -> set[str]:
    """Weights of the modules of these kinds, or of those layers of theirs."""
    return {
        ".".join(filter(None, (at, layer, name)))
        for at, module in model.named_modules()
        if isinstance(module, kinds)
        for layer in layers
        for name, _ in module.get_submodule(layer).named_parameters()
    }
