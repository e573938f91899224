"""The VAE of pictures: frame by frame, diffusers' own numbers to the bit, statistics, and what does not fit it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL

from codecs_support import CLIPS, PICTURES, SMALL, one_line, small
from ditkit.codecs import ImageVae
from ditkit.core.errors import CheckpointError, DataError, DitkitError, ShapeError


def test_a_clip_is_coded_as_its_frames_are():
    vae, x = small(), torch.randn(CLIPS)
    noise = torch.randn(2, *vae.latent_shape(CLIPS[1:]))
    z = vae.encode(x, noise)
    for i in range(CLIPS[2]):
        torch.testing.assert_close(z[:, :, i], vae.encode(x[:, :, i], noise[:, :, i]))
        torch.testing.assert_close(vae.decode(z)[:, :, i], vae.decode(z[:, :, i]))


@pytest.mark.parametrize(
    ("published", "quant"), [((0.18215, None), True), ((1.5305, 0.0609), False)], ids=["sd", "sd3"]
)
def test_a_vae_of_diffusers_gives_its_own_numbers_to_the_bit(tmp_path, published, quant):
    scale, shift = published
    theirs = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        mid_block_add_attention=not quant,
    ).eval()
    theirs.save_pretrained(tmp_path)
    x = torch.randn(3, 3, 8, 12)
    for ours in (ImageVae.from_diffusers(theirs), ImageVae.from_diffusers(tmp_path)):
        with torch.no_grad():
            posterior = theirs.encode(x).latent_dist
            z = (posterior.mode() - (shift or 0.0)) * scale
            assert torch.equal(ours.encode(x), z)
            drawn = posterior.sample(torch.Generator().manual_seed(3))
            noise = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(3))
            assert torch.equal(ours.encode(x, noise), (drawn - (shift or 0.0)) * scale)
            assert torch.equal(ours.decode(z), theirs.decode(z / scale + (shift or 0.0)).sample)
        assert (ours.config.widths, ours.config.quant_conv) == ((8, 16), quant)


def test_published_means_and_deviations_are_taken_a_channel():
    theirs = AutoencoderKL(
        block_out_channels=(8,),
        norm_num_groups=4,
        latent_channels=2,
        scaling_factor=0.5,
        latents_mean=(1.0, -2.0),
        latents_std=(2.0, 4.0),
    )
    ours = ImageVae.from_diffusers(theirs)
    assert ours.shift.tolist() == [1, -2] and ours.scale.tolist() == [0.25, 0.125]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"act_fn": "gelu"}, "act_fn=gelu of the AutoencoderKL, expected silu only"),
        (
            {"down_block_types": ("AttnDownEncoderBlock2D",)},
            "down_block_types=('AttnDownEncoderBlock2D',) of the AutoencoderKL, expected DownEncoderBlock2D only",
        ),
        ({"out_channels": 1}, "out_channels=1 of the AutoencoderKL, expected 3 only"),
    ],
)
def test_a_vae_that_our_config_cannot_describe_is_refused(change, expected):
    theirs = AutoencoderKL(**{"block_out_channels": (8,), "norm_num_groups": 4, **change})
    with pytest.raises(CheckpointError) as caught:
        ImageVae.from_diffusers(theirs)
    assert expected in one_line(caught)


def test_what_is_no_vae_is_refused(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        ImageVae.from_diffusers(torch.nn.Linear(1, 1))
    assert "a Linear was given, expected an AutoencoderKL" in one_line(caught)
    with pytest.raises(CheckpointError) as caught:
        ImageVae.from_diffusers(tmp_path)
    assert f"no AutoencoderKL at {tmp_path}: " in one_line(caught)


@pytest.mark.parametrize("shape", [PICTURES, CLIPS], ids=["pictures", "clips"])
def test_fitted_latents_have_mean_zero_and_deviation_one(shape, tmp_path):
    vae = small()
    data = 0.3 * torch.randn(6, *shape[1:]) + torch.randn(6, shape[1], *(1,) * (len(shape) - 2))
    vae.fit_statistics(data[i : i + 4] for i in (0, 4))  # batches of different sizes
    vae = ImageVae.load(vae.save(tmp_path))
    with torch.no_grad():
        z = vae.encode(data).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(z.mean(1), torch.zeros(4).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(1, correction=0), torch.ones(4).double(), atol=1e-5, rtol=0)
    assert vae.shift.dtype == vae.scale.dtype == torch.float32


def test_fitting_changes_no_picture():
    """The decoder sees the same latents before and after."""
    vae, x = small(), torch.randn(PICTURES)
    with torch.no_grad():
        before = vae.decode(vae.encode(x))
        vae.fit_statistics([x])
        torch.testing.assert_close(vae.decode(vae.encode(x)), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ([], "no pictures to measure statistics on"),
        ([torch.full(PICTURES, torch.nan)], "latent channel 0 should vary on the data and be finite"),
        ([torch.zeros(2, 3, 4, 4)], "latent channel 0 should vary on the data and be finite"),
    ],
    ids=["none", "nan", "constant"],
)
def test_statistics_that_cannot_be_measured_leave_the_old_ones(batches, expected):
    vae = small()
    before = vae.shift.clone(), vae.scale.clone()
    with pytest.raises(DataError) as caught:
        vae.fit_statistics(batches)
    assert expected in one_line(caught)
    assert torch.equal(vae.shift, before[0]) and torch.equal(vae.scale, before[1])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 3, 30, 32), "sides 30 x 32 should divide by 4, the side of a latent"),
        ((1, 3, 5, 32, 31), "sides 32 x 31 should divide by 4, the side of a latent"),
        ((1, 1, 32, 32), "a picture or clip of shape [1, 32, 32] should be [3, H, W] or [3, T, H, W]"),
        ((3, 32, 32), "a picture or clip of shape [32, 32] should be [3, H, W]"),
        ((1, 3, 0, 32), "a picture or clip of shape [3, 0, 32] should be [3, H, W]"),
    ],
)
def test_a_signal_that_does_not_fit_is_refused_in_one_line(shape, expected):
    with pytest.raises(ShapeError) as caught:
        small().encode(torch.zeros(shape))
    assert expected in one_line(caught)


def test_latents_that_do_not_fit_are_refused_in_one_line():
    with pytest.raises(ShapeError) as caught:
        small().decode(torch.zeros(1, 3, 4, 4))
    assert "latents of shape [3, 4, 4] should be [4, H, W] or [4, T, H, W]" in one_line(caught)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"latent_channels": 0}, "latent_channels=0 should be at least 1"),
        ({"widths": ()}, "widths=() should hold at least 1"),
        ({"widths": (8, 10)}, "a width of 10 does not divide into groups=4"),
        ({"layers": 101}, "layers=101 should be at most 100"),
        ({"size": 18}, "size=18 does not divide by 4"),
    ],
)
def test_sizes_that_make_no_network_are_refused_in_one_line(change, expected):
    with pytest.raises(DitkitError) as caught:
        replace(SMALL, **change)
    assert f"ImageVae: {expected}" in one_line(caught)


def test_half_precision_comes_in_and_float32_goes_out():
    vae, x = small(), torch.randn(PICTURES)
    z = vae.encode(x.bfloat16())
    assert z.dtype == vae.decode(z.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(z, vae.encode(x.bfloat16().float()))
