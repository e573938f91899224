"""TextDiT: what a prompt does, what no prompt is, and how it begins as a class-conditional DiT."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ditkit.caching import TaylorSeer
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError, ShapeError
from ditkit.core.inherit import Inherit, inherit
from ditkit.core.run import attended
from ditkit.models.dit import DiT, DiTConfig
from ditkit.models.text_dit import TextDiT, TextDiTConfig
from ditkit.recipes.emoji_text import emoji_text
from ditkit.sample import ClassifierFree, sample
from models_support import perturbed

CONFIG = TextDiTConfig.tiny()


def awake(config: TextDiTConfig = CONFIG) -> TextDiT:
    return perturbed(TextDiT(config), 0.1).eval()


def inputs(size: int = 3, tokens: int = 5) -> tuple[torch.Tensor, torch.Tensor, Cond]:
    text = torch.randn(size, tokens, CONFIG.text_width)
    return torch.randn(size, 3, 8, 8), torch.rand(size), Cond(text=text)


def test_padding_says_nothing():
    model, (x, t, cond) = awake().double(), inputs()
    x, t, text = x.double(), t.double(), cond.text.double()
    out = model(x, t, Cond(text=text))
    longer = torch.cat([text, torch.randn(3, 2, CONFIG.text_width).double()], 1)
    mask = torch.arange(7).expand(3, 7) < 5
    assert torch.allclose(model(x, t, Cond(text=longer, text_mask=mask)), out, atol=1e-12)
    assert not torch.allclose(model(x, t, Cond(text=longer)), out, atol=1e-3)


def test_no_prompt_is_one_learned_token_however_it_is_said():
    model, (x, t, cond) = awake().double(), inputs()
    x, t, cond = x.double(), t.double(), Cond(text=cond.text.double())
    nothing = model(x, t, Cond())
    assert model.unconditional(cond).text.shape == (3, 1, CONFIG.text_width)
    for other in (
        model.unconditional(cond),
        replace(cond, drop=torch.ones(3).bool()),
        replace(cond, absent={"text": torch.ones(3).bool()}),
    ):
        assert torch.allclose(model(x, t, other), nothing, atol=1e-12)
    some = model(x, t, replace(cond, absent={"text": torch.tensor([True, False, False])}))
    assert torch.allclose(some[0], nothing[0], atol=1e-12)
    assert torch.allclose(some[1:], model(x, t, cond)[1:], atol=1e-12)


def test_guidance_in_one_batch_equals_two_calls_though_lengths_differ():
    model, (_, _, cond) = awake(), inputs()
    drawn = [
        sample(model, cond, (0, 1, 2), steps=3, guidance=ClassifierFree(3.0), batched=batched)
        for batched in (False, True)
    ]
    assert (drawn[0].forwards, drawn[1].forwards) == (6, 3)
    assert torch.allclose(drawn[0].samples, drawn[1].samples, atol=1e-4)


def test_attention_to_the_prompt_names_its_stream():
    sites = {site.name: site for site in awake().sites()}
    cross = sites["blocks.1.cross_attn.core"]
    assert (cross.stream, cross.over, cross.heads) == ("image", ("text",), CONFIG.heads)
    assert sites["blocks.1.cross_attn.kv"].stream == "text"
    assert set(attended(sites.values())) == {"blocks.0.attn.core", "blocks.1.attn.core"}, (
        "patterns leave it alone"
    )


def test_a_cache_forecasts_its_branches():
    model, (_, _, cond) = awake(), inputs()
    drawn = sample(model, cond, (0, 1, 2), steps=6, policies=[TaylorSeer(interval=2, order=1)])
    (receipt,) = drawn.receipts
    assert 0 < len(receipt.full("cond")) < 6


def test_it_begins_as_the_dit_that_it_is_taken_from():
    """All but the label is inherited; with the label's vector at zero both networks are one function, to the bit."""
    config = DiTConfig(size=8, patch=2, channels=3, width=32, depth=2, heads=4, classes=5)
    source = perturbed(DiT(replace(config, convention=CONFIG.convention)), 0.1).eval()
    model = TextDiT(CONFIG).eval()
    rule = emoji_text().inherit
    assert rule is not None
    report = inherit(model, source, rule)
    assert report["left"] == 1, "the label"
    with torch.no_grad():
        source.label.weight.zero_()
    x, t, cond = inputs()
    assert torch.equal(model(x, t, cond), source(x, t, Cond(label=torch.zeros(3, dtype=torch.long))))
    with pytest.raises(ConfigError, match="has no tensor 'null'"):
        inherit(TextDiT(CONFIG), source, Inherit())


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        (Cond(text=torch.ones(3, 5, 7)), r"text \[3, 5, 7\] should be \[3, S, 30\]"),
        (Cond(text=torch.ones(2, 5, 30)), r"text \[2, 5, 30\] should be \[3, S, 30\]"),
        (
            Cond(text=torch.ones(3, 5, 30), text_mask=torch.ones(3, 4).bool()),
            r"text_mask \[3, 4\] of torch.bool",
        ),
        (
            Cond(text=torch.ones(3, 5, 30), text_mask=torch.ones(3, 5)),
            r"of torch.float32 should be \[3, 5\] of bool",
        ),
    ],
)
def test_a_text_of_another_shape_is_refused(cond, message):
    x, t, _ = inputs()
    with pytest.raises(ShapeError, match=message):
        awake()(x, t, cond)
