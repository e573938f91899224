"""The optimisers of a run: AdamW for every weight, or Muon for the matrices of the blocks and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from ditkit.core.errors import ConfigError
from ditkit.core.model import Model
from ditkit.train.settings import Settings

MOMENTS: dict[type[Optimizer], tuple[str, ...]] = {
    AdamW: ("exp_avg", "exp_avg_sq", "step"),
    Muon: ("momentum_buffer",),
}
"""What each keeps of a weight from step to step, by the name of its state."""
MUON_MOMENTUM = 0.95


def optimizers_of(model: Model, settings: Settings) -> tuple[Optimizer, ...]:
    """What steps the model's weights; no weight belongs to two.

    Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) gives a matrix's momentum singular values near 1.
    Its step is scaled to the size of AdamW's (Moonlight, arXiv 2502.16982, eq. 4), so that one learning rate serves
    both; embeddings, heads, norms and biases are AdamW's, as in both sources. Queries, keys and values that are one
    layer are one matrix here.

    Raises:
        ConfigError: Muon is asked for and the model has no matrix in a stack of blocks.
    """
    of_muon = matrices(model) if settings.optimizer == "muon" else []
    if settings.optimizer == "muon" and not of_muon:
        raise ConfigError(
            f"training: optimizer='muon' is for linear layers in blocks; a {type(model).__name__} has none"
        )
    spared = [weight for weight in undecayed(model) if weight not in set(of_muon)]
    apart = {*of_muon, *spared}
    others = [weight for weight in model.parameters() if weight not in apart]
    groups: list[dict[str, Any]] = [{"params": others}]
    adamw = AdamW(
        [*groups, {"params": spared, "weight_decay": 0.0}] if spared else groups,
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )
    if not of_muon:
        return (adamw,)
    muon = Muon(
        of_muon,
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        momentum=MUON_MOMENTUM,
        adjust_lr_fn="match_rms_adamw",
    )
    return (muon, adamw)


def undecayed(model: Model) -> list[Tensor]:
    """Weights that weight decay leaves out: those that a module's class names in `undecayed`."""
    of_class = ((module, getattr(type(module), "undecayed", ())) for module in model.modules())
    return list(dict.fromkeys(getattr(module, name) for module, names in of_class for name in names))


def matrices(model: Model) -> list[Tensor]:
    """Weights of the linear layers that stand in a list of blocks, each once."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = (layer for blocks in lists for layer in blocks.modules() if isinstance(layer, nn.Linear))
    return list(dict.fromkeys(layer.weight for layer in layers))


def moments_of(optimizers: Sequence[Optimizer]) -> int:
    """Numbers that are kept of the weights that are trained: two of each for AdamW, one for Muon."""
    each = {kind: sum(name != "step" for name in names) for kind, names in MOMENTS.items()}
    return sum(
        each[type(optimizer)] * weight.numel()
        for weight, optimizer in owners(optimizers).items()
        if weight.requires_grad
    )


def owners(optimizers: Sequence[Optimizer]) -> dict[Tensor, Optimizer]:
    """Which optimiser steps a weight."""
    return {
        weight: optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for weight in group["params"]
    }
