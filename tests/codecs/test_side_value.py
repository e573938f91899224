"""A codec with a side value (D2iT, arXiv 2504.09454): a map of coarse regions, whose four cells are one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.core.codec import IDENTITY, SIDE, Codec, Coded, Identity, IdentityConfig
from ditkit.core.cond import Cond
from ditkit.core.condition import Condition
from ditkit.core.config import Count, ModelConfig
from ditkit.core.convention import Convention
from ditkit.core.errors import ConfigError, ShapeError
from ditkit.core.model import Denoiser
from ditkit.core.run import DIRECT, Run, Site
from ditkit.sample import EulerMaruyama, Sampler, sample
from ditkit.tasks.latent import LatentDataset
from ditkit.train.denoising import Denoising
from ditkit.train.randomness import SampleRNG

SIZE = 4
FLOW = Convention()


def copied(z: Tensor, coarse: Tensor) -> Tensor:
    """The first cell of each coarse region in all of its four."""
    first = z[..., ::2, ::2].repeat_interleave(2, -1).repeat_interleave(2, -2)
    return torch.where(F.interpolate(coarse.float(), scale_factor=2).bool(), first, z)


class TwoGrains(Codec):
    """Latents are the signal itself; a region that is flat is coarse: one value in four cells."""

    Config = IdentityConfig

    def __init__(self) -> None:
        super().__init__()
        self.config = IdentityConfig()

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.code(x, noise).z

    def code(self, x: Tensor, noise: Tensor | None = None) -> Coded:
        spread = F.max_pool2d(x, 2) + F.max_pool2d(-x, 2)
        coarse = (spread.amax(1, keepdim=True) < 0.1).float()
        return Coded(copied(x, coarse), coarse)

    def decode(self, z: Tensor) -> Tensor:
        raise AssertionError("it is decoded by its side value")

    def decode_coded(self, coded: Coded) -> Tensor:
        assert coded.side is not None
        return copied(coded.z, coded.side) + 10 * F.interpolate(coded.side, scale_factor=2)

    def weave(self, noise: Tensor, side: Tensor) -> Tensor:
        return copied(noise, side)

    def side_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1, shape[1] // 2, shape[2] // 2)

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(shape)

    def signal_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(shape)


@dataclass(frozen=True)
class CellConfig(ModelConfig):
    """A toy.

    Args:
        channels: of a sample. size: of its sides.
    """

    task: ClassVar[str] = "image"
    channels: Count = 2
    size: Count = SIZE
    convention: Convention = FLOW

    @property
    def conditions(self) -> Mapping[str, Condition]:
        return {SIDE: Condition((1, None, None))}

    @classmethod
    def tiny(cls) -> Self:
        return cls()


class Cellwise(Denoiser):
    """What it predicts of a cell follows from that cell, so equal cells stay equal."""

    Config = CellConfig

    def __init__(self, config: CellConfig) -> None:
        super().__init__()
        self.config, self.scale = config, nn.Parameter(torch.tensor(0.7))
        self.inputs: list[Tensor] = []

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return (self.config.channels, self.config.size, self.config.size)

    def sites(self) -> tuple[Site, ...]:
        return ()

    def unconditional(self, cond: Cond) -> Cond:
        return cond

    def forward(self, x: Tensor, t: Tensor, cond: Cond, run: Run = DIRECT) -> Tensor:
        self.inputs.append(x.detach())
        return self.scale * x.sin()


def model() -> Cellwise:
    network = Cellwise(CellConfig()).eval()
    network.codec = TwoGrains()
    return network


COARSE = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).expand(3, 1, 2, 2)
COND = Cond(streams={SIDE: COARSE})


def is_copied(x: Tensor) -> bool:
    return torch.equal(copied(x, COARSE.to(x.device)), x)


def test_every_draw_of_a_stochastic_sampler_is_woven():
    network = model()
    drawn = sample(network, COND, (0, 1, 2), steps=5, solver=EulerMaruyama())
    assert len(network.inputs) >= 5 and all(map(is_copied, network.inputs)) and is_copied(drawn.samples)
    fine = drawn.samples[:, :, :2, 2:]
    assert fine.std() > 0 and not torch.equal(fine, fine.roll(1, -1)), "a fine region has four values"
    plain = replace_codec(model(), IDENTITY)
    sample(plain, COND, (0, 1, 2), steps=5, solver=EulerMaruyama())
    assert not is_copied(plain.inputs[0])


def replace_codec(network: Cellwise, codec: Codec) -> Cellwise:
    network.codec = codec
    return network


def test_samples_are_decoded_by_the_side_value():
    found = Sampler.of(model(), cond=COND, seeds=(0, 1, 2), steps=3, batch_size=2).draw()
    assert (found.samples[:, :, :2, :2] > 5).all() and (found.samples[:, :, :2, 2:] < 5).all()


class Pictures:
    """Three pictures, flat in the regions that are coarse."""

    def __init__(self) -> None:
        fine = torch.randn(3, 2, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        self.pictures = torch.where(F.interpolate(COARSE, scale_factor=2).bool(), torch.ones(()), fine)

    def __len__(self) -> int:
        return 3

    def batch(self, indices: Tensor, rng: SampleRNG) -> tuple[Tensor, Cond]:
        maps = self.pictures[indices, :1]
        return self.pictures[indices], Cond(streams={"edges": maps})


def test_training_sees_the_side_value_and_woven_noise():
    network, rng = model().train(), SampleRNG(0, 0, range(3))
    z, cond = LatentDataset(Pictures(), TwoGrains(), network.conditions).batch(torch.arange(3), rng)
    assert torch.equal(cond.streams[SIDE], COARSE) and "edges" in cond.streams
    told = replace(cond, streams={SIDE: cond.streams[SIDE]})
    losses = Denoising()(network, network, z, told, rng)
    assert is_copied(network.inputs[-1]) and losses["loss"].isfinite()


@pytest.mark.parametrize(
    ("cond", "error", "message"),
    [
        (
            Cond(),
            ConfigError,
            r"a TwoGrains decodes by a side value, expected Cond.streams\['side'\] .*; got none",
        ),
        (
            Cond(streams={SIDE: torch.ones(3, 1, 4, 4)}),
            ShapeError,
            r"TwoGrains: side \[3, 1, 4, 4\] should be",
        ),
    ],
)
def test_a_missing_or_odd_side_value_is_refused_in_one_line(cond, error, message):
    for refused in (
        lambda: sample(model(), cond, (0, 1, 2), steps=1),
        lambda: Sampler.of(model(), cond=cond, seeds=(0, 1, 2)),
    ):
        with pytest.raises(error, match=message) as caught:
            refused()
        assert "\n" not in str(caught.value)


def test_all_other_codecs_have_none():
    x = torch.randn(2, 3, 4, 4)
    assert Identity().code(x) == Coded(x, None) and Identity().side_shape((3, 4, 4)) is None
    assert Identity().decode_coded(Coded(x)) is x and Identity().weave(x, x[:, :1]) is x
