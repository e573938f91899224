"""What a model can be given: streams, their dropout, branches of guidance, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import pytest
import torch
from torch import Tensor, nn

from ditkit.core.codec import encode_given
from ditkit.core.cond import Cond, check_cond
from ditkit.core.condition import Condition
from ditkit.core.config import Count, ModelConfig
from ditkit.core.convention import Convention
from ditkit.core.errors import ConfigError, ShapeError
from ditkit.core.model import Denoiser
from ditkit.core.run import DIRECT, Run, Site
from ditkit.core.trajectory import Trajectory
from ditkit.sample import Autoguidance, ClassifierFree, Nested, Sampler, sample
from ditkit.sample.denoiser import GuidedDenoiser
from ditkit.train.denoising import Denoising, without_dropped
from ditkit.train.randomness import SampleRNG

FLOW = Convention()


@dataclass(frozen=True)
class ToldConfig(ModelConfig):
    """A toy.

    Args:
        channels: of a sample. size: of its sides.
    """

    task: ClassVar[str] = "image"
    channels: Count = 2
    size: Count = 4
    convention: Convention = FLOW

    @property
    def conditions(self) -> Mapping[str, Condition]:
        return {
            "text": Condition((None, 3), 0.25),
            "audio": Condition((None, 5), 0.5),
            "source": Condition((2, None, None), 0.0, coded=True),
            "camera": Condition((6,), 0.0, optional=False),
        }

    @classmethod
    def tiny(cls) -> Self:
        return cls()


class Told(Denoiser):
    """Adds up what it is given: the mean of each stream, times a weight of its own."""

    Config = ToldConfig
    branches = ("cond", "uncond", "silent")

    def __init__(self, config: ToldConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.tensor([1.0, 10.0, 100.0, 1000.0]))

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return (self.config.channels, self.config.size, self.config.size)

    def sites(self) -> tuple[Site, ...]:
        return ()

    def unconditional(self, cond: Cond) -> Cond:
        """Another length: one token of zeros, and sources of one row."""
        streams = {"camera": torch.zeros_like(cond.streams["camera"])}
        if "source" in cond.streams:
            streams["source"] = torch.zeros_like(cond.streams["source"][:, :, :1])
        text = None if cond.text is None else torch.zeros_like(cond.text[:, :1])
        return Cond(text=text, streams=streams)

    def branch(self, cond: Cond, name: str) -> Cond:
        if name != "silent":
            return super().branch(cond, name)
        return replace(cond, streams={k: v for k, v in cond.streams.items() if k != "audio"})

    def forward(self, x: Tensor, t: Tensor, cond: Cond, run: Run = DIRECT) -> Tensor:
        total = torch.zeros(len(x), dtype=x.dtype)
        for weight, kind in zip(self.weight, ("text", "audio", "source", "camera"), strict=True):
            value = cond.text if kind == "text" else cond.streams.get(kind)
            if value is None:
                continue
            if kind == "text":
                mask = (
                    torch.ones(value.shape[:2], dtype=torch.bool)
                    if cond.text_mask is None
                    else cond.text_mask
                )
                mean = (value.mean(-1) * mask).sum(1) / mask.sum(1)
            else:
                mean = value.flatten(1).mean(1)
            absent = cond.dropped(kind)
            total = total + weight * (mean if absent is None else mean.masked_fill(absent, 0))
        return x * 0 + total[:, None, None, None].to(x.dtype)


COND = Cond(
    text=torch.full((2, 4, 3), 1.0),
    streams={
        "audio": torch.full((2, 7, 5), 1.0),
        "source": torch.full((2, 2, 6, 5), 1.0),
        "camera": torch.full((2, 6), 1.0),
    },
)


def model() -> Told:
    return Told(ToldConfig()).eval()


# -- Cond


def test_streams_are_mapped_cut_and_joined_with_the_rest():
    cond = replace(COND, absent={"audio": torch.tensor([True, False])})
    assert dict(cond.rows(slice(1)).tensors())["streams.audio"].shape == (1, 7, 5)
    assert cond.map(lambda v: v[:0]).streams["camera"].shape == (0, 6)
    both = Cond.cat([cond.rows(slice(1)), cond.rows(slice(1, 2))])
    assert [name for name, _ in both.tensors()] == [name for name, _ in cond.tensors()]
    for (name, a), (_, b) in zip(both.tensors(), cond.tensors(), strict=True):
        assert torch.equal(a, b), name


def test_texts_of_two_lengths_are_joined_and_masked():
    short = Cond(text=torch.ones(1, 1, 3))
    both = Cond.cat(
        [Cond(text=torch.ones(2, 4, 3), text_mask=torch.tensor([[1, 1, 1, 0]] * 2).bool()), short]
    )
    assert both.text.shape == (3, 4, 3)
    assert both.text_mask.tolist() == [[True, True, True, False]] * 2 + [[True, False, False, False]]


def test_what_cannot_be_joined_is_named():
    with pytest.raises(ShapeError, match=r"streams.a of samples of \[\[3\], \[2\]\], expected one shape"):
        Cond.cat([Cond(streams={"a": torch.ones(1, n)}) for n in (3, 2)])
    with pytest.raises(ConfigError, match=r"different conditioning: .*'streams.a'.*'streams.b'"):
        Cond.cat([Cond(streams={n: torch.ones(1, 2)}) for n in "ab"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"streams": {"audoi": torch.ones(2, 1)}},
            ConfigError,
            r"Told: unknown stream 'audoi'; did you mean 'audio'",
        ),
        (
            {"streams": {"audio": torch.ones(2, 7, 4)}},
            ShapeError,
            r"audio \[2, 7, 4\] should be \[2, \*, 5\]",
        ),
        (
            {"streams": {"audio": torch.ones(1, 7, 5)}},
            ShapeError,
            r"audio \[1, 7, 5\] should be \[2, \*, 5\]",
        ),
        ({"streams": {}}, ConfigError, r"camera is needed, \[B, 6\]; got none"),
        ({"text": torch.ones(2, 4, 2)}, ShapeError, r"text \[2, 4, 2\] should be \[2, \*, 3\]"),
        (
            {"maps": torch.ones(2, 1)},
            ConfigError,
            "got Cond.maps, expected none: it takes text, audio, source, camera",
        ),
    ],
)
def test_what_a_model_cannot_be_given_is_refused_in_one_line(change, error, message):
    streams = {"camera": COND.streams["camera"], **change.get("streams", {})}
    given = replace(COND, **{"streams": streams, **{k: v for k, v in change.items() if k != "streams"}})
    if change.get("streams") == {}:
        given = replace(given, streams={})
    for refused in (
        lambda: check_cond("Told", model().conditions, given, 2),
        lambda: Sampler.of(model(), cond=given, seeds=(0, 1)),
        lambda: sample(model(), given, (0, 1), steps=1),
        lambda: Denoising()(model(), model(), torch.zeros(2, 2, 4, 4), given, SampleRNG(0, 0, range(2))),
    ):
        with pytest.raises(error, match=message) as caught:
            refused()
        assert "\n" not in str(caught.value)


# -- dropout


def test_each_condition_is_dropped_by_its_own_share():
    n = 400
    cond = COND.rows(torch.zeros(n, dtype=torch.long))
    rng = SampleRNG(0, 3, range(n))
    _, _, draw = rng.draws((1,))
    dropped = without_dropped(cond, model(), draw, rng)
    shares = {name: value.float().mean().item() for name, value in dropped.absent.items()}
    assert set(shares) == {"text", "audio"}
    assert shares["text"] == pytest.approx(0.25, abs=0.07) and shares["audio"] == pytest.approx(0.5, abs=0.08)
    both = (dropped.absent["text"] & dropped.absent["audio"]).float().mean().item()
    assert both == pytest.approx(0.125, abs=0.06), "each has a draw of its own"
    assert not dropped.drop.any(), "there is no label"
    again = without_dropped(cond, model(), draw, SampleRNG(0, 3, range(n)))
    assert all(torch.equal(again.absent[k], v) for k, v in dropped.absent.items())


def test_what_is_absent_already_stays_so():
    rng = SampleRNG(0, 0, range(2))
    cond = replace(COND, absent={"text": torch.tensor([True, False])})
    kept = without_dropped(cond, model(), torch.ones(2), rng)
    assert kept.absent["text"].tolist() == [True, False]


# -- branches


def field(guidance, network=None, batched=False):
    network = network or model()
    return GuidedDenoiser(network, COND, guidance, Trajectory((), (), 4), batched=batched)


X = torch.zeros(2, 2, 4, 4, dtype=torch.float64)


def test_a_null_condition_of_another_length():
    """(1 + 10 + 100 + 1000) with all, 0 with none: guided by 2 it is twice that."""
    for batched in (False, True):
        found = field(ClassifierFree(2.0), batched=batched)
        assert torch.allclose(found(X, 0.5).value, torch.tensor(2222.0).double())
        assert found.forwards == 2, "its source has another length, so it is a call of its own"
    text = Cond(text=COND.text, streams={"camera": COND.streams["camera"]})
    joined = GuidedDenoiser(model(), text, ClassifierFree(2.0), Trajectory((), (), 4), batched=True)
    assert torch.allclose(joined(X, 0.5).value, torch.tensor(2002.0).double())
    assert joined.forwards == 1, "a shorter text is padded"


def test_any_number_of_named_branches():
    value = field(Nested((2.0, 3.0), ("uncond", "silent", "cond")))(X, 0.5).value
    assert torch.allclose(value, torch.tensor(2 * 1101.0 + 3 * 10).double())
    plain, nested = field(ClassifierFree(2.0)), field(Nested((2.0,), ("uncond", "cond")))
    assert torch.equal(plain(X, 0.5).value, nested(X, 0.5).value)
    alone = field(Nested((1.0, 1.0), ("uncond", "silent", "cond")))
    assert torch.equal(alone(X, 0.5).value, field(ClassifierFree(1.0))(X, 0.5).value)
    assert alone.forwards == 1


def test_three_branches_in_one_batch_equal_three_calls():
    cond = replace(COND, streams={k: v for k, v in COND.streams.items() if k == "camera"})
    guidance = Nested((2.0, 3.0), ("uncond", "silent", "cond"))
    network = model()
    values = []
    for batched in (False, True):
        one = GuidedDenoiser(network, cond, guidance, Trajectory((), (), 4), batched=batched)
        values.append(one(X, 0.5).value)
        assert one.forwards == (1 if batched else 3)
    assert torch.allclose(*values)


def test_a_network_of_guidance_is_apart_from_branches():
    guide = model()
    with torch.no_grad():
        guide.weight.zero_()
    found = field(Autoguidance(3.0, guide))
    assert torch.allclose(found(X, 0.5).value, torch.tensor(3333.0).double())
    assert torch.allclose(found.lane("guide:silent").cond.streams["camera"], COND.streams["camera"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("silnt", "Told: unknown guidance branch 'silnt'; did you mean 'silent'"),
        ("guid:cond", "guidance: unknown network 'guid'"),
    ],
)
def test_an_unknown_branch_or_network_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        field(Nested((1.0, 2.0), ("uncond", name, "cond")))(X, 0.5)


def test_scales_must_fit_branches():
    with pytest.raises(ConfigError, match="expected a scale for each branch"):
        Nested((1.0,), ("uncond", "silent", "cond"))


# -- what a codec codes


def test_streams_that_are_signals_are_coded_whatever_their_length():
    from codecs_support import small

    codec = small()
    signal = torch.randn(2, 3, 16, 8)
    cond = replace(COND, streams={**COND.streams, "source": signal})
    coded = encode_given(codec, cond, model().conditions)
    assert torch.equal(coded.streams["source"], codec.encode(signal))
    assert coded.streams["audio"] is cond.streams["audio"]


def test_texts_maps_and_pixels_travel_beside_latents_where_they_are_asked_for():
    from codecs_support import small
    from ditkit.tasks.latent import PIXELS, LatentDataset

    pictures = torch.randn(2, 3, 16, 8)

    class Captioned:
        def __len__(self) -> int:
            return 2

        def batch(self, indices: Tensor, rng: SampleRNG) -> tuple[Tensor, Cond]:
            return pictures[indices], Cond(text=torch.ones(2, 3, 3), maps=pictures[indices, :1])

    rng, codec = SampleRNG(0, 0, range(2)), small()
    for conditions, streams in (({}, set()), ({PIXELS: Condition((3, None, None))}, {PIXELS})):
        z, cond = LatentDataset(Captioned(), codec, conditions).batch(torch.arange(2), rng)
        assert z.shape[1:] == codec.latent_shape((3, 16, 8))
        assert cond.text.shape == (2, 3, 3) and torch.equal(cond.maps, pictures[:, :1])
        assert set(cond.streams) == streams
    assert torch.equal(cond.streams[PIXELS], pictures)
