"""diffusers' `Attention`, which many families share: with sites where its processor's computation is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from diffusers.models import attention_processor as host
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from ditkit.core.errors import ConflictError
from ditkit.core.policy import Policy
from ditkit.core.run import DIRECT, Run, Site
from ditkit.hosts.view import stands_for

Sited = Callable[..., Any]
"""`sited(attn, run, at, hidden_states, encoder_hidden_states, attention_mask, **kwargs)`, as the processor."""

_SITED: dict[type, Sited] = {}
_OPEN: set[type] = set()
"""Processors whose computation a view knows, and has sites in."""
_BEYOND: set[type] = set()
"""The processors in `_KNOWN` whose queries also attend to keys from outside their own sequence."""


def computes_as(processor: type, *, beyond: bool = False) -> Callable[[Sited], Sited]:
    """Mark a function as what `processor` computes, with `kv` and `core` sites.

    Args:
        beyond: whether a core has keys that are no rows of its sequence, such as an IP-Adapter's pictures.
    """

    def mark(sited: Sited) -> Sited:
        _SITED[processor] = sited
        opens(processor)
        if beyond:
            _BEYOND.add(processor)
        return sited

    return mark


def opens(processor: type) -> None:
    """Say that a view of another attention than diffusers' `Attention` does what `processor` does, with sites."""
    _OPEN.add(processor)


def has_core(attn: Any) -> bool:
    """Return whether attention has sites: the processors of IP-Adapters, fused layers and a user's own have none."""
    return type(attn.processor) in _OPEN


def closed(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Path and processor of each self-attention whose keys cannot be kept, nor replaced.

    It has no sites, or keys that are no rows of its sequence.
    """
    for path, module in model.named_modules():
        processor = getattr(module, "processor", None)
        if processor is None or getattr(module, "is_cross_attention", False):
            continue
        if not has_core(module) or type(processor) in _BEYOND:
            yield path, type(processor).__name__


def refuse_closed(model: nn.Module, sites: Sequence[Site], policies: Sequence[Policy]) -> None:
    """Raise ConflictError where a policy of rows would meet attention whose keys it cannot keep, nor replace."""
    # the keys of these cores come from elsewhere, which a policy of rows refuses too, but not by the processor
    own = [site for site in sites if not site.over]
    rows = [type(policy).__name__ for policy in policies if policy.claims(own).get("rows") == "own"]
    for path, processor in closed(model) if rows else ():
        raise ConflictError(
            f"{rows[0]}: {path} attends by {processor}, where no keys can be kept; expected diffusers' default "
            "processor, without fused layers or an IP-Adapter"
        )


@stands_for(host.Attention)
class Attention(host.Attention):
    """Attention that hands its run to the function marked for its processor; diffusers' own without one."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        run: Run = DIRECT,
        at: str = "",
        **kwargs: Any,
    ) -> Any:
        sited = _SITED.get(type(self.processor))
        if sited is None or not at:
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        return sited(self, run, at, hidden_states, encoder_hidden_states, attention_mask, **kwargs)


def dispatched(processor: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of [B, N, L, K] through the backend that the processor was given."""
    backend, parallel = processor._attention_backend, processor._parallel_config
    return flip(
        dispatch_attention_fn(flip(q), flip(k), flip(v), mask, backend=backend, parallel_config=parallel)
    )


def flip(x: Tensor) -> Tensor:
    """Between diffusers' [B, L, N, K] and the sites' [B, N, L, K]."""
    return x.transpose(1, 2)
