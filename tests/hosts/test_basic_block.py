"""DiT and PixArt: sizes, chunked layers, and what diffusers' basic block does beside them."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock

from ditkit.core.errors import ConfigError, ConflictError, ShapeError
from ditkit.core.run import Run
from ditkit.hosts.view import restore, view
from hosts_support import FAMILIES, VARIANTS, B, C, D, Draws, Inputs, S, call, same_in_both, shared


def test_dit_of_another_size() -> None:
    host, inputs = FAMILIES["dit"].transformer(), FAMILIES["dit"].inputs()
    large: Inputs = {"hidden_states": Draws(2)(B, C, 12, 12)}
    expected = call(host, inputs, **large)
    viewed = view(host)
    assert same_in_both(viewed, inputs, expected, **large)
    with pytest.raises(ShapeError, match=r"input \[2, 4, 4, 16\] should have equal sides"):
        call(viewed, inputs, hidden_states=torch.zeros(B, C, 4, 16))


def test_other_blocks_of_dits_class_stay_as_they_are() -> None:
    host = FAMILIES["dit"].transformer()
    torch.manual_seed(0)
    host.extra = BasicTransformerBlock(D, 4, 16, cross_attention_dim=32).eval()
    x, text = torch.randn(B, 5, D), torch.randn(B, S, 32)
    with torch.no_grad():
        expected = host.extra(x, encoder_hidden_states=text)
        assert torch.equal(view(host).extra(x, encoder_hidden_states=text), expected)


def test_pixart_asks_for_the_size_where_it_needs_it() -> None:
    viewed, inputs, _ = shared("pixart sized")
    assert "added_cond_kwargs" in VARIANTS["pixart sized"].inputs()
    with pytest.raises(ConfigError, match="added_cond_kwargs=None, expected resolution and aspect_ratio"):
        call(viewed, inputs, added_cond_kwargs=None)


@pytest.mark.parametrize("option", ["mask", "cross-attention to itself"])
def test_what_goes_with_all_rows_refuses_some(option: str) -> None:
    given: Inputs = {"attention_mask": torch.ones(B, 24).tril(5)}
    if option != "mask":
        given = {"encoder_hidden_states": None, "encoder_attention_mask": None}
    changed = {} if option == "mask" else {"caption_channels": None}
    viewed = view(FAMILIES["pixart"].transformer(**changed))
    some = Run({"tokens": lambda fn, *args: fn(*args).rows("image", torch.arange(4))})
    with pytest.raises(ConflictError, match="goes with all rows, not with some"):
        call(viewed, FAMILIES["pixart"].inputs(), some, **given)


def test_chunked_layers_of_pixart() -> None:
    host, (_, inputs, plain) = FAMILIES["pixart"].transformer(), shared("pixart")
    for block in host.transformer_blocks:
        block.set_chunk_feed_forward(1, 0)
    assert same_in_both(view(host), inputs, call(restore(copy.deepcopy(host)), inputs))
    assert torch.allclose(call(host, inputs), plain, atol=1e-6)
