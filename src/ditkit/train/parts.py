"""Which weights of a network are trained; the others are frozen."""

from __future__ import annotations

from typing import Literal

from ditkit.core.errors import ConfigError
from ditkit.core.model import Model
from ditkit.nn.blocks import Attention

Part = Literal["all", "attention"]


def train_only(model: Model, part: Part) -> None:
    """Freeze what is not of `part`.

    Args:
        part: "attention" is the projections to queries, keys and values and that of the output, without norms, and
            what policies train of their own (CLEAR, arXiv 2412.16112).

    Raises:
        ConfigError: the model has no attention.
    """
    if part == "all":
        return
    model.requires_grad_(False)
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    if not attentions:
        raise ConfigError(f"trained='attention': a {type(model).__name__} has none that can be told apart")
    for module in attentions:
        module.qkv.requires_grad_()
        module.out.requires_grad_()
    model.learned.requires_grad_()
