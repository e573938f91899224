"""Prompts as a network reads them: an encoder's tokens, checked, and what stands in the place of a missing one.

B batch, S text tokens, D channels of a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.errors import ShapeError


class Prompt(NamedTuple):
    """A prompt's tokens [B, S, D], with the mask [B, S] of those that are real; at least one of each sample is."""

    tokens: Tensor
    mask: Tensor


def read_prompt(name: str, cond: Cond, null: Tensor, batch: int, dropout: float = 0.0) -> Prompt:
    """Return the prompts as the encoder has them, checked; of dropped samples the null token alone is left.

    Args:
        name: of the network. null: [D], the token of no prompt. batch: the number of samples.
        dropout: share of the samples that count as without a prompt, drawn here where `cond` does not say which.

    Raises:
        ShapeError: the prompt, or its mask, is of another shape.
    """
    text, mask, width = cond.text, cond.text_mask, null.shape[-1]
    null = null.expand(batch, 1, -1)
    if text is None:
        return Prompt(null, torch.ones(batch, 1, dtype=torch.bool, device=null.device))
    if text.ndim != 3 or len(text) != batch or text.shape[2] != width:
        raise ShapeError(f"{name}: text {list(text.shape)} should be [{batch}, S, {width}]")
    mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask
    if mask.shape != text.shape[:2] or mask.dtype != torch.bool:
        raise ShapeError(
            f"{name}: text_mask {list(mask.shape)} of {mask.dtype} should be {list(text.shape[:2])} of bool"
        )
    text, drop = text.to(null.dtype), cond.dropped("text")
    if drop is None and dropout:
        drop = torch.rand(batch, device=text.device) < dropout
    empty = ~mask.any(1)  # no token is no prompt
    drop = empty if drop is None else drop | empty
    first = torch.arange(text.shape[1], device=text.device) == 0
    return Prompt(torch.where(drop[:, None, None], null, text), torch.where(drop[:, None], first, mask))
