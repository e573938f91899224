"""The judge of pictures and the teacher of alignment: shapes, sites, what they learn from, and their folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ditkit.core.errors import CheckpointError, ConfigError, ShapeError
from ditkit.core.run import Run, named
from ditkit.nn.classifier import PictureClassifier, PictureClassifierConfig
from ditkit.nn.frozen import load_network, save_network
from ditkit.nn.vit import ViT, ViTConfig

DONORS = Path(__file__).parents[2] / "benchmarks" / "donors"
SMALL = ViTConfig(size=8, patch=2, width=16, depth=2, heads=2, classes=3)


def judge(**changes: object) -> PictureClassifier:
    torch.manual_seed(0)
    return PictureClassifier(PictureClassifierConfig(**{"widths": (4, 6), "classes": 3, **changes})).eval()


def teacher() -> ViT:
    torch.manual_seed(0)
    return ViT(SMALL).eval()


def test_features_and_classes_of_a_judge() -> None:
    x, network = torch.randn(2, 1, 9, 12), judge()
    assert network.features(x).shape == (2, 6) and network(x).shape == (2, 3)
    assert torch.equal(network(x), network.head(network.features(x)))
    torch.testing.assert_close(network(x[1:]), network(x)[1:])
    with pytest.raises(ShapeError, match=r"\[2, 3, 9, 12\] should be \[B, 1, H, W\]"):
        network(x.expand(-1, 3, -1, -1))
    with pytest.raises(ConfigError, match="2 class names for 3 classes"):
        judge(class_names=("a", "b"))
    with pytest.raises(ConfigError, match="one stage or more"):
        judge(widths=())


def test_a_vit_is_attention_and_mlp_on_patches_with_positions() -> None:
    """Against the formula written out with torch's own attention."""
    network, x = teacher(), torch.randn(3, 1, 8, 8)
    patches = x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).flatten(1, 3)
    h = network.embed(patches) + network.position
    for block in network.blocks:
        q, k, v = block.attn.qkv(block.norm_attn(h)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        o = (q @ k.mT / 8**0.5).softmax(-1) @ v
        h = h + block.attn.out(o.transpose(1, 2).flatten(2))
        inner = nn.functional.gelu(block.mlp.inner(block.norm_mlp(h)), approximate="tanh")
        h = h + block.mlp.outer(inner)
    torch.testing.assert_close(network.features(x), network.norm(h))
    torch.testing.assert_close(network(x), network.head(network.norm(h).mean(1)))


def test_queries_and_keys_are_reached_at_the_core_sites() -> None:
    network, x, found = teacher(), torch.randn(3, 1, 8, 8), {}

    def look(name: str):
        def handler(fn, q: Tensor, k: Tensor, *rest: Tensor) -> Tensor:
            found[name] = (q, k)
            return fn(q, k, *rest)

        return handler

    cores = named(network.sites(), "core")
    out = network(x, Run({name: look(name) for name in cores}))
    assert torch.equal(out, network(x))
    assert list(found) == cores == ["blocks.0.attn.core", "blocks.1.attn.core"]
    assert {t.shape for pair in found.values() for t in pair} == {(3, 2, 16, 8)}
    called: list[str] = []

    class Listing(Run):
        def site(self, name, fn, *args):
            called.append(name)
            return fn(*args)

    network(x, Listing())
    assert sorted(called) == sorted(site.name for site in network.sites())


def test_places_see_no_positions() -> None:
    """The same patches in another order are placed alike, and only those that are kept matter."""
    network, x = teacher(), torch.randn(2, 1, 8, 8)
    kept = torch.stack([torch.randperm(16)[:5] for _ in range(2)])
    said = network.places(x, kept)
    assert said.shape == (2, 5, 16)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(network.places(x, kept[:, order]), said[:, order])
    other = network.patches(x).clone()
    gone = torch.ones(2, 16, dtype=torch.bool).scatter(1, kept, False)
    other[gone] = 9.0
    columns = other.unflatten(1, (4, 4)).unflatten(3, (2, 2)).transpose(2, 3).reshape(2, 1, 8, 8)
    torch.testing.assert_close(network.places(columns, kept), said)
    with pytest.raises(ShapeError, match=r"\[2, 1, 8, 6\] should be \[B, 1, 8, 8\]"):
        network.places(x[..., :6], kept)


@pytest.mark.parametrize("network", [judge(), teacher()], ids=["judge", "teacher"])
def test_a_folder_gives_the_same_network_back(network, tmp_path: Path) -> None:
    x = torch.randn(2, 1, 8, 8)
    found = load_network(type(network), save_network(network, tmp_path / "own"))
    assert found.config == network.config and not found.training
    assert torch.equal(found(x), network(x))
    assert not any(parameter.requires_grad for parameter in found.parameters())


def test_another_network_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    folder = save_network(judge(), tmp_path)
    with pytest.raises(CheckpointError, match="holds a PictureClassifier, expected a ViT"):
        load_network(ViT, folder)
    described = json.loads((folder / "config.json").read_text())
    described["config"]["widths"] = [4, 8]
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match="shape"):
        load_network(PictureClassifier, folder)


@pytest.mark.parametrize(
    ("kind", "name", "size", "least"),
    [(PictureClassifier, "judge", 205_000, 0.88), (ViT, "vit", 1_100_000, 0.8)],
    ids=["judge", "vit"],
)
def test_the_trained_ones_are_as_their_cards_say(kind, name: str, size: int, least: float) -> None:
    if not (DONORS / name / "training.json").exists():
        pytest.skip(f"benchmarks/donors/{name} is not trained yet")
    facts = json.loads((DONORS / name / "training.json").read_text())
    network = load_network(kind, DONORS / name)
    assert sum(p.numel() for p in network.parameters()) == facts["parameters"] <= size
    assert least <= facts["accuracy"] <= 1 and len(facts["accuracy_by_class"]) == 10
    assert f"{facts['accuracy']:.2%}" in (DONORS / name / "README.md").read_text()
    assert network(torch.full((1, 1, 32, 32), -1.0)).shape == (1, 10)
