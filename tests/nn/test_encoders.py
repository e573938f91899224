"""Frozen encoders of pictures: tokens on the grid that is asked for, attention among patches, and plain refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.core.errors import CheckpointError, ConfigError, DataError, ShapeError
from ditkit.nn.efficientnet import EfficientNetLite0, normalised
from ditkit.nn.encoders import (
    Facts,
    LiteEncoder,
    TransformersEncoder,
    ViTEncoder,
    attention_map,
    facts_of,
    picture_encoder,
    standardised,
)
from ditkit.nn.vit import ViT, ViTConfig

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
}
TINY = Facts(24, 4, 3, 3)
GRID = (6, 6)


def pictures(side: int = 24, channels: int = 3) -> Tensor:
    return torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def networks() -> dict[str, Any]:
    """Tiny vision transformers with random weights, by the number of their tokens that are no patches."""
    import transformers as t

    torch.manual_seed(0)
    return {
        "Dinov2": (1, t.Dinov2Model(t.Dinov2Config(**SIZES))),
        "Registers": (5, t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(num_register_tokens=4, **SIZES))),
        "Siglip": (0, t.SiglipVisionModel(t.SiglipVisionConfig(**SIZES))),
        "MAE": (1, t.ViTMAEModel(t.ViTMAEConfig(**SIZES))),
        "ViT": (1, t.ViTModel(t.ViTConfig(**SIZES))),
    }  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, Path]]:
    found = {}
    for name, (extra, network) in networks().items():
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))  # norms are not the identity
        network.save_pretrained(folder := tmp_path_factory.mktemp(name))
        found[name] = extra, folder
    return found


@pytest.mark.parametrize("name", ["Dinov2", "Registers", "Siglip", "MAE", "ViT"])
def test_a_vision_transformer_is_opened_by_its_folder(folders: dict[str, Any], name: str) -> None:
    extra, folder = folders[name]
    assert facts_of(str(folder)) == TINY
    encoder = picture_encoder(str(folder))
    assert isinstance(encoder, TransformersEncoder) and not encoder.training
    tokens, maps = encoder(pictures(), GRID, maps=2)
    assert tokens.shape == (2, 36, 24) and [m.shape for m in maps] == [(2, 3, 36, 36)] * 2
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 3, 36))
    assert torch.equal(encoder(pictures(), GRID).tokens, tokens)
    options = {"noise": torch.arange(36.0).expand(2, -1)} if name == "MAE" else {}
    if name in {"Siglip", "MAE", "ViT"}:
        options["interpolate_pos_encoding"] = True
    x = standardised(pictures(), (24, 24), encoder.mean, encoder.std)
    with torch.no_grad():
        out = encoder.network(pixel_values=x, output_attentions=True, **options)
    assert torch.equal(tokens, out.last_hidden_state[:, extra:])
    own = out.attentions[-1][:, :, extra:, extra:]
    torch.testing.assert_close(maps[1], own / own.sum(-1, keepdim=True))
    assert encoder(pictures(), (2, 3)).tokens.shape == (2, 6, 24)  # resized, positions interpolated
    grey = encoder(pictures(channels=1), GRID).tokens
    torch.testing.assert_close(grey, encoder(pictures(channels=1).expand(-1, 3, -1, -1), GRID).tokens)


@pytest.mark.parametrize("name", ["Dinov2", "Registers", "Siglip", "MAE"])
def test_without_its_last_scale_a_token_has_mean_0_and_variance_1(folders: dict[str, Any], name: str) -> None:
    tokens = picture_encoder(str(folders[name][1]), affine=False)(pictures(), GRID).tokens
    assert tokens.mean(-1).abs().max() < 1e-5
    assert (tokens.var(-1, unbiased=False) - 1).abs().max() < 1e-4
    affine = picture_encoder(str(folders[name][1]))(pictures(), GRID).tokens
    assert affine.mean(-1).abs().max() > 1e-2


def test_patches_of_mae_are_in_their_order(folders: dict[str, Any]) -> None:
    encoder = picture_encoder(str(folders["MAE"][1]))
    assert isinstance(encoder, TransformersEncoder)
    embed, x = encoder.network.embeddings, pictures(16)
    with torch.no_grad():
        rows, _, restore = embed(x, noise=torch.arange(16.0).expand(2, -1))
        places = rows[:, 1:] - embed.patch_embeddings(x)
    assert torch.equal(restore, torch.arange(16).expand(2, -1)) and rows.shape[1] == 17
    torch.testing.assert_close(places[0], places[1], rtol=0, atol=1e-5)


def test_the_mean_and_deviation_are_the_encoders_own(folders: dict[str, Any], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "own"
    shutil.copytree(folders["Siglip"][1], folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    )
    encoder = picture_encoder(str(folder))
    assert encoder.mean == encoder.std == (0.5, 0.5, 0.5)
    torch.testing.assert_close(standardised(pictures(), (24, 24), encoder.mean, encoder.std), pictures())


def test_a_vit_of_ours() -> None:
    torch.manual_seed(0)
    network = ViT(ViTConfig(size=8, patch=2, width=12, depth=3, heads=3, classes=4)).eval()
    encoder, x = ViTEncoder(network), pictures(8, 1)
    tokens, maps = encoder(x, (4, 4), maps=2)
    assert torch.equal(tokens, network.features(x)) and len(maps) == 2
    q, k = torch.randn(2, 2, 3, 5, 4)
    slow = torch.stack(
        [(a @ b.mT / 2).softmax(-1) for a, b in zip(q.flatten(0, 1), k.flatten(0, 1), strict=True)]
    )
    torch.testing.assert_close(attention_map(q, k).flatten(0, 1), slow)
    colour = pictures(16, 3)
    smaller = F.interpolate(colour, (8, 8), mode="bicubic").mean(1, keepdim=True)
    assert torch.equal(encoder(colour, (4, 4)).tokens, network.features(smaller))
    with pytest.raises(ConfigError, match="makes 4 x 4 tokens only, the model has 2 x 2"):
        encoder(x, (2, 2))


@pytest.mark.parametrize(
    ("block", "width", "stride"), [(0, 16, 2), (4, 40, 8), (10, 112, 16), (14, 192, 32), (15, 320, 32)]
)
def test_positions_of_efficientnet(block: int, width: int, stride: int) -> None:
    torch.manual_seed(0)
    network = EfficientNetLite0().eval()
    encoder = LiteEncoder(network, block)
    assert encoder.facts == facts_of(f"efficientnet-lite0:{block}") == Facts(width, stride)
    tokens = encoder(pictures(), (2, 3)).tokens
    assert tokens.shape == (2, 6, width)
    if block == 14:
        x = normalised(pictures(), (2 * stride, 3 * stride))
        torch.testing.assert_close(tokens.mean(1), network.taps(x)["blocks.14"])
        even = LiteEncoder(network, block, affine=False)(pictures(), (2, 3)).tokens
        assert even.mean(-1).abs().max() < 1e-5
    with pytest.raises(ConfigError, match="has no attention"):
        encoder(pictures(), (2, 3), maps=1)


def test_what_is_no_encoder_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": 8}')
    for source, error, message in (
        (str(tmp_path / "none"), CheckpointError, "no encoder"),
        (str(tmp_path), ConfigError, "expected a vision transformer with hidden_size and patch_size"),
        ("efficientnet-lite0:x", ConfigError, "expected a block from 0 to 15"),
    ):
        with pytest.raises(error, match=message) as refused:
            facts_of(source)
        assert "\n" not in str(refused.value)
    with pytest.raises((ShapeError, DataError), match=r"pictures \[B, 1 or 3, H, W\]"):
        picture = torch.zeros(1, 4, 8, 8)
        ViTEncoder(ViT(ViTConfig(size=8, patch=2, width=12, depth=1, heads=3)))(picture, (4, 4))
