"""What every codec owes: stated shapes, exact files, frames in order, and a refusal of what is no codec."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from codecs_support import CLIPS, PICTURES, equal, one_line, small
from ditkit.codecs.representation import RepresentationCodec, RepresentationConfig
from ditkit.codecs.standardised import Standardised
from ditkit.core.catalog import every
from ditkit.core.codec import IDENTITY, Codec, fingerprint, frame_by_frame
from ditkit.core.errors import CheckpointError


def codec_of(kind: type[Codec]) -> Codec:
    """One that takes pictures of three channels; a new codec without defaults is added here."""
    if kind is Standardised:
        return Standardised.of(
            "uvp", ("m/s", "m/s", "Pa"), torch.tensor([1.0, 2, 3]), torch.tensor([2.0, 1, 9])
        )
    if kind is RepresentationCodec:  # of pictures of one size
        return RepresentationCodec(RepresentationConfig(size=(16, 8), depth=1)).eval()
    return kind(kind.Config()).eval()


@pytest.mark.parametrize("kind", every(Codec), ids=lambda kind: kind.__name__)  # type: ignore[type-abstract]
@pytest.mark.parametrize("shape", [PICTURES, CLIPS], ids=["pictures", "clips"])
def test_shapes_are_those_that_are_stated(kind, shape):
    codec = codec_of(kind)
    x = torch.rand(shape) * 2 - 1
    with torch.no_grad():
        z = codec.encode(x)
        again = codec.decode(z)
        drawn = codec.encode(x, torch.randn(z.shape))
    assert tuple(z.shape[1:]) == codec.latent_shape(shape[1:]) and len(z) == shape[0]
    assert codec.signal_shape(tuple(z.shape[1:])) == shape[1:]
    assert again.shape == x.shape and drawn.shape == z.shape
    assert z.dtype == again.dtype == torch.float32


@pytest.mark.parametrize("kind", every(Codec), ids=lambda kind: kind.__name__)  # type: ignore[type-abstract]
def test_a_saved_codec_is_read_back_to_the_bit(kind, tmp_path):
    codec = codec_of(kind)
    codec.history = ("trained",)
    codec.save(tmp_path / "a")
    before = torch.get_rng_state()
    loaded = Codec.load(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(loaded, codec) and (loaded.config, loaded.history) == (codec.config, codec.history)
    assert not loaded.training and not any(v.is_meta for v in loaded.state_dict().values())
    x = torch.randn(PICTURES)
    assert torch.equal(loaded.encode(x), codec.encode(x))
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["codec.safetensors", "config.json"]


def test_the_identity_is_nothing_at_all():
    x = torch.randn(CLIPS)
    assert IDENTITY.encode(x) is x and IDENTITY.encode(x, torch.randn(CLIPS)) is x and IDENTITY.decode(x) is x
    assert list(IDENTITY.parameters()) == [] and IDENTITY.state_dict() == {}


@pytest.mark.parametrize("frames", [1, 5, 33])
def test_frames_are_folded_in_order_and_in_parts(frames):
    sizes = []

    def number(pictures: Tensor) -> Tensor:
        sizes.append(len(pictures))
        return pictures[:, :1] * 2

    x = torch.randn(2, 3, frames, 4, 4)
    assert torch.equal(frame_by_frame(number, x), x[:, :1] * 2)
    assert sum(sizes) == 2 * frames and max(sizes) <= 32


def test_a_fingerprint_is_of_the_content():
    state = {"a": torch.randn(3, 2), "b": torch.tensor(1), "c": torch.zeros(0)}
    again = {k: state[k].clone() for k in ("c", "b", "a")}
    assert fingerprint(state) == fingerprint(again)
    others = [
        state | {"a": state["a"].T.reshape(3, 2)},
        state | {"a": state["a"].view(2, 3)},
        state | {"b": torch.tensor(1, dtype=torch.int32)},
        {k if k != "c" else "d": v for k, v in state.items()},
    ]
    assert len({fingerprint(s) for s in (state, *others)}) == 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", "no 'codec' that names a codec"),
        ('{"codec": "ImageVea"}', "unknown codec 'ImageVea'; did you mean 'imagevae'?"),
        ('{"codec": "ImageVae", "confg": {}}', "unknown key 'confg'; did you mean 'config'?"),
        ('{"codec": "ImageVae", "config": {"widths": 3}}', "widths=3 should be a tuple of integers"),
        ('{"codec": "ImageVae", "config": {}, "history": 1}', "'history' should be a list"),
        ('{"codec": "Identity", "config": {}}', "unexpected tensor"),
    ],
)
def test_a_config_that_is_no_codec_is_refused(tmp_path, text, expected):
    small().save(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        Codec.load(tmp_path)
    assert expected in one_line(caught)
