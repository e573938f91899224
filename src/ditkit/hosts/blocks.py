"""Parts shared by the blocks of several families: default attention, modulation, feed-forward, and the call.

B batch, L rows, S text rows, D width, N heads, K head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import attention as host_blocks
from diffusers.models import attention_processor as host
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from ditkit.core.grid import Grid, unpatchify
from ditkit.core.run import AttentionKind, Run, Site
from ditkit.hosts.attention import computes_as, has_core
from ditkit.hosts.streams import Streams
from ditkit.nn.blocks import KV, keep
from ditkit.nn.compiled import run_block
from ditkit.nn.modulation import modulate

_QUIET = {"ip_adapter_masks", "ip_hidden_states"}
"""Arguments that diffusers drops without a warning, where a processor does not know them."""


@computes_as(host.JointAttnProcessor2_0)
def attend(
    attn: Any,
    run: Run,
    at: str,
    image: Tensor,
    text: Tensor | None = None,
    mask: Tensor | None = None,
    beside: Callable[[Tensor, KV], Tensor] | None = None,
    **kwargs: Any,
) -> Any:
    """Self-attention [B, L, D] to the same; with text [B, S, D] joint attention, image rows first, to the pair.

    Args:
        mask: ignored, as diffusers does.
        beside: of the image's queries and kept keys, before their norms, what is added to its rows [B, L, D].
    """
    warn_of_unknown(attn.processor, kwargs)
    q, k, v = (split_heads(attn, project(image)) for project in (attn.to_q, attn.to_k, attn.to_v))
    kv = run.site(at + ".kv", keep, KV(k, v))
    raw_q = q
    q, k, v = _normed(attn.norm_q, q), _normed(attn.norm_k, kv.k), kv.v
    if text is not None:
        projections = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
        text_q, text_k, text_v = (split_heads(attn, project(text)) for project in projections)
        q = torch.cat([q, _normed(attn.norm_added_q, text_q)], 2)
        k = torch.cat([k, _normed(attn.norm_added_k, text_k)], 2)
        v = torch.cat([v, text_v], 2)
    o = run.site(at + ".core", F.scaled_dot_product_attention, q, k, v)
    o = merge_heads(o).to(q.dtype)
    L = image.shape[1]
    o_image = o[:, :L] if beside is None else o[:, :L] + beside(raw_q, kv)
    o_image = attn.to_out[1](attn.to_out[0](o_image))
    if text is None:
        return o_image
    return Streams(o_image, o[:, L:] if attn.context_pre_only else attn.to_add_out(o[:, L:]))


@computes_as(host.AttnProcessor2_0)
def attend_within(
    attn: Any,
    run: Run,
    at: str,
    x: Tensor,
    other: Tensor | None = None,
    mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Self-attention [B, L, D] to the same; to another sequence, or under a mask, it has no sites."""
    if other is None and mask is None:
        return attend(attn, run, at, x, **kwargs)
    return attn.processor(attn, x, other, mask, **kwargs)


def attention_sites(
    at: str, attn: Any, core: str = "image", kv: str = "image", attention: AttentionKind = "full"
) -> list[Site]:
    """List the sites inside the attention branch `at`: keys and values of stream `kv`, queries of stream `core`."""
    if not has_core(attn):
        return []
    return [
        Site(at + ".kv", "kv", kv, attn.to_k.out_features, keys_heads(attn)),
        Site(at + ".core", "core", core, attn.to_q.out_features, attn.heads, attention=attention),
    ]


def keys_heads(attn: Any) -> int:
    """Return the number of heads of the keys, each of which several heads of queries may share."""
    head: int = attn.to_q.out_features // attn.heads
    return int(attn.to_k.out_features // head)


def as_wide(sites: Sequence[Site], width: int) -> tuple[Site, ...]:
    """Fill in `width` where a site does not name its own."""
    return tuple(site if site.width else site._replace(width=width) for site in sites)


def call_block(model: Any, block: nn.Module, run: Run, name: str, *args: Any, **given: Any) -> Any:
    """One block, called as diffusers does: its hooks see the arguments that they know.

    Args:
        args, given: all parameters of the block before `run`, in its order.
    """
    # no name without handlers: blocks share their code, and torch.compile would specialise on it
    at = name if run.named else ""
    if torch.is_grad_enabled() and model.gradient_checkpointing:
        # the run is handed on: recomputation may happen on a thread that has no context variable
        return model._gradient_checkpointing_func(block, *args, *given.values(), run, at)
    return run_block(block, run, at, *args, **given)


def modulation(norm: Any, temb: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Shifts, scales and gates of an adaptive norm, [B, 1, D] each."""
    return norm.linear(norm.silu(temb)).unsqueeze(1).chunk(parts, -1)


def chosen(mark: Tensor | None, part: Tensor, other: Sequence[Tensor]) -> Tensor:
    """One part of a modulation: [B, 1, D], or [B, L, D] where marked rows, bool [B, L], have `other[0]`."""
    return part if mark is None else torch.where(mark[..., None], other[0], part)


def modulated(
    norm: nn.Module, x_BLD: Tensor, mark: Tensor | None, by: Sequence[Tensor], other: Sequence[Tensor]
) -> Tensor:
    """Norm, shift and scale; those of marked rows are `other`."""
    shift, scale = (chosen(mark, part, other[i : i + 1]) for i, part in enumerate(by))
    return modulate(norm(x_BLD), shift, scale)


def clip_half(x: Tensor) -> Tensor:
    """Keep features in the range of float16, as diffusers does after some blocks."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def feed(norm: nn.Module, ff: nn.Module, x_BLD: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Compute the MLP branch before its gate, row by row."""
    return ff(modulate(norm(x_BLD), shift, scale))


def feed_in_chunks(
    block: Any, norm: nn.Module, ff: nn.Module, x_BLD: Tensor, shift: Tensor, scale: Tensor
) -> Tensor:
    """Compute the MLP branch before its gate, in chunks where `enable_forward_chunking` asks for them."""
    if block._chunk_size is None:
        return feed(norm, ff, x_BLD, shift, scale)
    h_BLD = modulate(norm(x_BLD), shift, scale)
    return host_blocks._chunked_feed_forward(ff, h_BLD, block._chunk_dim, block._chunk_size)


def rotate(x_BLNK: Tensor, table: tuple[Tensor, ...]) -> Tensor:
    """Turn by cosines and sines [L, K], or [B, L, K] of rows that were chosen for each sample."""
    if table[0].ndim == 2:
        return apply_rotary_emb(x_BLNK, table, sequence_dim=1)
    # rows chosen for each sample have tables of their own, and diffusers knows one: all samples as one sequence
    one = (table[0].flatten(0, 1), table[1].flatten(0, 1))
    return apply_rotary_emb(x_BLNK.flatten(0, 1)[None], one, sequence_dim=1).view_as(x_BLNK)


def unpatchify_channels_first(out: Tensor, grid: Grid, patch: tuple[int, ...]) -> Tensor:
    """Rows [B, L, C P], channels slowest, to a sample [B, C, H, W] or [B, C, T, H, W]."""
    return unpatchify(out.unflatten(-1, (-1, prod(patch))).mT.flatten(-2), grid, patch)


def split_heads(attn: Any, x_BLD: Tensor) -> Tensor:
    return x_BLD.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # [B, N, L, K]


def merge_heads(o_BNLK: Tensor) -> Tensor:
    return o_BNLK.transpose(1, 2).flatten(2)  # [B, L, D]


def _normed(norm: nn.Module | None, x_BNLK: Tensor) -> Tensor:
    return x_BNLK if norm is None else norm(x_BNLK)


def warn_of_unknown(processor: Any, kwargs: Mapping[str, Any]) -> None:
    """Warn of arguments that a processor does not take, and diffusers drops."""
    if kwargs:
        known = inspect.signature(processor.__call__).parameters
        if unknown := sorted(kwargs.keys() - known.keys() - _QUIET):
            name = type(processor).__name__
            host.logger.warning(
                f"cross_attention_kwargs {unknown} are not expected by {name} and are ignored."
            )
