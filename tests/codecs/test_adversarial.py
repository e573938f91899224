"""The adversary of RAE's decoder: its heads, its pictures, its balance, and the step from which it is felt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.codecs.representation import RepresentationCodec, RepresentationConfig, decided
from ditkit.core.convention import Convention
from ditkit.core.errors import ConfigError
from ditkit.nn.discriminator import TokenHead, TokenHeads, augmented
from ditkit.nn.encoders import picture_encoder
from ditkit.nn.frozen import save_network
from ditkit.nn.vit import ViT, ViTConfig
from ditkit.train.autoencoding import DecodedBatch, Decoding
from ditkit.train.denoising import Denoising
from ditkit.train.loop import Training
from ditkit.train.randomness import SampleRNG
from ditkit.train.schedules import Between
from ditkit.train.teacher import Answer
from ditkit.train.terms.adversarial import Adversarial
from ditkit.train.terms.regression import AbsoluteError, Regression
from scripts.toy_run import Pictures, settings, toy_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("vit")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(3)
        save_network(ViT(ViTConfig(size=8, patch=2, width=12, depth=3, heads=3, classes=4)), folder)
    return f"vit:{folder}"


def term(source: str, **changed: Any) -> Adversarial:
    return replace(Adversarial(encoder=source, blocks=(2, 0, 1), kernel=3), **changed)


def test_the_heads_are_the_papers() -> None:
    """Five heads with kernels of 1, 9 and 1 on 384 channels, norms over a sample's own tokens, neighbours in a ring."""
    with torch.device("meta"):
        heads = TokenHeads(384, 9, 5)
    each = (384**2 + 384) + 2 * 384 + (9 * 384**2 + 384) + 2 * 384 + (384 + 1)
    assert sum(p.numel() for p in heads.parameters()) == 5 * each == 7_386_245
    torch.manual_seed(0)
    head, x = TokenHead(6, 3).eval(), torch.randn(2, 5, 6)
    weights = [layer[0].weight for layer in (head.inner, head.residual)] + [head.out.weight]
    for weight in weights:
        assert torch.linalg.matrix_norm(weight.detach().flatten(1), 2).item() == pytest.approx(1, rel=0.05)

    def normed(h: Tensor) -> Tensor:
        mean, variance = h.mean(1, keepdim=True), h.var(1, unbiased=False, keepdim=True)
        return torch.nn.functional.leaky_relu((h - mean) / (variance + 1e-6).sqrt(), 0.2)

    h = normed(x @ weights[0][..., 0].mT + head.inner[0].bias)
    ring = torch.cat([h[:, -1:], h, h[:, :1]], 1)
    near = sum(ring[:, i : i + 5] @ weights[1][..., i].mT for i in range(3)) + head.residual[0].bias
    h = (normed(near) + h) / 2**0.5
    expected = (h @ weights[2][..., 0].mT + head.out.bias).squeeze(-1)
    assert torch.allclose(head(x), expected, atol=1e-5)
    assert torch.allclose(head(x)[:1], head(x[:1]), atol=1e-6)  # no sample sees its neighbour


def test_pictures_are_shifted_and_recoloured_one_by_one() -> None:
    x = torch.rand(2, 3, 8, 8).requires_grad_()
    same = torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.5]] * 2)
    assert torch.allclose(augmented(x, same), x, atol=1e-6)
    moved = augmented(x, torch.tensor([[0.99, 0.0, 0.5, 0.5, 0.5], [0.5] * 5]))
    assert torch.allclose(moved[0, :, :-1, 1:], x[0, :, 1:, :-1], atol=1e-6)
    assert not moved[0, :, -1].any() and not moved[0, :, :, 0].any()
    assert torch.allclose(moved[1], x[1], atol=1e-6)
    bright = augmented(x, torch.tensor([[0.5, 0.5, 1.0, 0.5, 0.5]] * 2))
    assert torch.allclose(bright, x + 0.5, atol=1e-6)
    grey = augmented(x, torch.tensor([[0.5, 0.5, 0.5, 0.0, 0.5]] * 2))
    assert torch.allclose(grey, x.mean(1, keepdim=True).expand_as(x), atol=1e-6)
    flat = augmented(x, torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.0]] * 2))
    mean = x.mean((1, 2, 3), keepdim=True)
    assert torch.allclose(flat, mean + 0.5 * (x - mean), atol=1e-6)
    moved.sum().backward()
    assert x.grad is not None and x.grad[1].all()


class Fixed(torch.nn.Module):
    """Logits by the mean of the pictures."""

    def forward(self, tokens: Any) -> Tensor:
        return tokens[0]


class Eye:
    """A network whose tokens are what it is given."""

    class facts:
        grid = (4, 4)

    def after_blocks(self, x: Tensor, grid: Any, blocks: Any) -> list[Tensor]:
        return [x.flatten(1)]


def test_the_hinge_of_rounded_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditkit.train.terms.adversarial.augmented", lambda x, u: x)
    data, clean = torch.full((2, 1, 2, 2), 0.4), torch.full((2, 1, 2, 2), -1.7)
    prediction = torch.full((2, 1, 2, 2), 0.25, requires_grad=True)
    batch = DecodedBatch(
        data=data,
        prediction=prediction,
        taps={},
        clean=clean,
        own=Fixed(),
        rng=SampleRNG(0, 0, range(2)),
        taught=Answer(Eye(), {}),
    )
    found = Adversarial()
    assert found.loss(batch).tolist() == pytest.approx([-0.25] * 2)
    assert found.opposed(batch).tolist() == pytest.approx([(0.6 + 0.0) / 2] * 2)
    rounded = DecodedBatch(**{**vars(batch), "clean": torch.full((2, 1, 2, 2), 0.1)})
    assert found.opposed(rounded).tolist() == pytest.approx([(0.6 + 1 + 140 / 127.5 - 1) / 2] * 2)
    assert not Adversarial(decoder_after=1).loss(batch).requires_grad


def gradients(
    source: str, folder: Path, *terms: Any, steps: int = 0
) -> tuple[Training, Mapping[str, Tensor]]:
    torch.manual_seed(0)
    config = decided(
        RepresentationConfig(size=8, patch=2, encoder=source, width=16, hidden=32, heads=2, depth=1), 1
    )
    own: Any = RepresentationCodec(config)
    given = settings(steps=4, warmup=1, save_every=0, batch=4)
    run = Training(own, Pictures(), Decoding((AbsoluteError(), *terms)), given, folder)
    run.open({}, False)
    for _ in range(steps):
        run.step()
    return run, {name: p.grad.clone() for name, p in own.named_parameters() if p.grad is not None}


def test_its_gradient_on_the_last_layer_is_its_weight_times_the_others(source: str, tmp_path: Path) -> None:
    found = {}
    for name, terms in (("alone", ()), ("both", (term(source),))):
        run, _ = gradients(source, tmp_path / name, *terms)
        for opponent in run.opponents:
            run.modules[opponent].requires_grad_(False)
        run.gradients([])
        found[name] = run.model.decoder.out.weight.grad
    own = found["both"] - found["alone"]
    assert own.norm() == pytest.approx(0.75 * found["alone"].norm().item(), rel=1e-3)
    assert term(source, most=1e-3).balance(*balanced(1.0, 1.0)).item() == pytest.approx(1e-3)
    assert term(source).balance(*balanced(3.0, 2.0)).item() == pytest.approx(1.5, rel=1e-5)


def balanced(one: float, other: float) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.ones(1, requires_grad=True)
    return (one * weight).sum(), (other * weight).sum(), weight


def test_the_decoder_feels_it_from_its_step_on_and_its_heads_before(source: str, tmp_path: Path) -> None:
    adversary = term(source, weight=Between(0.75, 1, 4), decoder_after=2, rate=1e-2)
    plain, _ = gradients(source, tmp_path / "plain")
    opposed, _ = gradients(source, tmp_path / "opposed", adversary)
    before = {n: v.clone() for n, v in opposed.modules.state_dict().items()}
    same, learned = [], []
    for _ in range(3):
        plain.step()
        opposed.step()
        pairs = zip(plain.model.parameters(), opposed.model.parameters(), strict=True)
        same.append(all(torch.equal(a, b) for a, b in pairs))
        learned.append(any(not torch.equal(v, before[n]) for n, v in opposed.modules.state_dict().items()))
    assert same == [True, True, False] and learned == [False, True, True]
    assert not any(name.startswith("Adversarial") for name in opposed.model.state_dict())


def test_tokens_after_blocks_are_those_inside(source: str) -> None:
    encoder = picture_encoder(source)
    x = torch.rand(2, 1, 8, 8).requires_grad_()
    first, last = encoder.after_blocks(x, (4, 4), (0, 2))
    norm: Any = encoder.network.norm
    assert torch.allclose(norm(last), encoder(x, (4, 4)).tokens, atol=1e-6) and not torch.equal(first, last)
    last.sum().backward()
    assert x.grad is not None and x.grad.any()
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=2,
    )
    from ditkit.nn.encoders import TransformersEncoder

    other = TransformersEncoder(transformers.ViTModel(config, add_pooling_layer=False)).eval()
    after = other.after_blocks(x, (4, 4), (1,))[0]
    assert torch.allclose(other.network.layernorm(after), other(x, (4, 4)).tokens, atol=1e-5)


def test_what_does_not_fit_is_refused(source: str) -> None:
    config = decided(
        RepresentationConfig(size=8, patch=2, encoder=source, width=16, hidden=32, heads=2, depth=1), 1
    )
    codec: Any = RepresentationCodec(config)
    for changed, message in (
        ({"blocks": (3,)}, "Adversarial needs blocks from 0 to 2 of vit"),
        ({"kernel": 4}, "Adversarial needs a kernel of an odd number of tokens; got 4"),
    ):
        with pytest.raises(ConfigError, match=message):
            Decoding((AbsoluteError(), term(source, **changed))).check(codec)
    with pytest.raises(ConfigError, match="needs a decoder of a frozen encoder's tokens"):
        Denoising((Regression(), term(source))).check(toy_model(Convention()))
    with pytest.raises(ConfigError, match="no blocks of tokens of one width"):
        from ditkit.nn.efficientnet import EfficientNetLite0
        from ditkit.nn.encoders import LiteEncoder

        LiteEncoder(EfficientNetLite0()).after_blocks(torch.zeros(1, 1, 8, 8), (4, 4), (0,))
