"""Adapters of peft, such as LoRAs, at work in a transformer, so that a switch between two steps is noticed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

CARRIERS = ("joint_attention_kwargs", "attention_kwargs", "cross_attention_kwargs")
"""Arguments of diffusers' transformers that may hold a `scale` of all adapters."""


class Adapters:
    """The adapters of one transformer through one pipeline call; without peft this costs nothing."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._configs: list[Any] = []
        self._layers: list[Any] = []

    def at_work(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return a key that changes when adapters are loaded, set, scaled, merged, disabled or deleted."""
        configs = list(vars(self.model).get("peft_config", {}).values())
        if not configs:
            return ()
        if [id(config) for config in configs] != [id(config) for config in self._configs]:
            self._configs, self._layers = configs, self._adapted()
        scales = [(arguments.get(name) or {}).get("scale") for name in CARRIERS]
        return *map(id, configs), *scales, *map(_state, self._layers)

    def _adapted(self) -> list[Any]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        return [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]


def _state(layer: Any) -> tuple[Any, ...]:
    scales = tuple(getattr(layer, "scaling", {}).items())  # not all kinds of adapters have any
    return layer.disable_adapters, tuple(layer.active_adapters), tuple(layer.merged_adapters), scales
