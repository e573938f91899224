import math

import pytest
import torch
from torch import Tensor

from ditkit.core.errors import ConfigError, DataError, ShapeError
from ditkit.metrics import perceptual
from ditkit.metrics.features import EfficientNetLite0, load_efficientnet_lite0, normalised
from ditkit.metrics.image import psnr_db, ssim, ssim_map
from ditkit.metrics.perceptual import (
    COMPARED,
    FRAMES_AT_ONCE,
    WIDTHS,
    ClipFeature,
    feature_distance,
    frame_feature_distance,
)
from ditkit.metrics.video import (
    clip_scores,
    frame_psnr_db,
    frame_ssim,
    temporal_psnr_db,
    temporal_relative_l2,
)
from ditkit.nn import efficientnet


def clips(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def squares(seed: int, n: int, frames: int, size: int = 32, side: int = 10) -> Tensor:
    """Coloured squares that bounce off the walls of a black room: [n, 3, frames, size, size]."""
    g = torch.Generator().manual_seed(seed)
    out, room = torch.full((n, 3, frames, size, size), -1.0), size - side
    for clip in out:
        colour = torch.rand(3, 1, 1, generator=g) * 2 - 1
        start, speed = torch.rand(2, generator=g) * room, (torch.rand(2, generator=g) * 2 - 1) * 4
        for t in range(frames):
            # a bounce is a reflection: fold the straight line into the room
            y, x = (room - ((start + t * speed) % (2 * room) - room).abs()).round().int().tolist()
            clip[:, t, y : y + side, x : x + side] = colour
    return out


def region(*shape: int) -> Tensor:
    """A mask [B, 1, T, H, W]: frame 0 given, half of frame 1 made, all of the others."""
    mask = torch.ones(shape[0], 1, *shape[2:])
    mask[:, :, 0] = 0
    mask[:, :, 1, : shape[3] // 2] = 0
    return mask


def test_frames_are_scored_as_pictures_are():
    x, ref = clips(0, 2, 3, 4, 16, 12), clips(1, 2, 3, 4, 16, 12)
    decibels, similarity = frame_psnr_db(x, ref), frame_ssim(x, ref)
    assert decibels.shape == similarity.shape == (2, 4)
    for t in range(4):
        torch.testing.assert_close(decibels[:, t], psnr_db(x[:, :, t], ref[:, :, t]))
        torch.testing.assert_close(similarity[:, t], ssim(x[:, :, t], ref[:, :, t]))


def test_only_what_was_made_is_scored():
    shape = (2, 3, 4, 16, 12)
    x, ref, mask = clips(0, *shape), clips(1, *shape), region(*shape)
    decibels, similarity = frame_psnr_db(x, ref, mask), frame_ssim(x, ref, mask)
    assert decibels[:, 0].isnan().all() and similarity[:, 0].isnan().all()
    half_x, half_ref = x[:, :, 1, 8:], ref[:, :, 1, 8:]
    torch.testing.assert_close(decibels[:, 1], psnr_db(half_x, half_ref))
    whole = ssim_map(x[:, :, 1], ref[:, :, 1])
    torch.testing.assert_close(similarity[:, 1], whole[:, :, 8:].mean((1, 2, 3)))
    torch.testing.assert_close(decibels[:, 2:], frame_psnr_db(x, ref)[:, 2:])
    moved = torch.where(mask.bool(), x, x + 0.5)
    assert torch.equal(frame_psnr_db(moved, ref, mask)[:, 1:], decibels[:, 1:])


def test_equal_clips_are_exactly_equal_with_and_without_a_mask():
    x = clips(0, 2, 1, 3, 16, 16)
    for mask in (None, region(*x.shape)):
        scores = clip_scores(x, x, mask)
        means = {"psnr_db": math.inf, "ssim": 1, "temporal_psnr_db": math.inf, "temporal_relative_l2": 0}
        assert scores.means() == means


def test_flicker_is_seen_between_frames_and_an_offset_is_not():
    ref = squares(0, 2, 6)
    offset = ref + 0.1
    assert (temporal_psnr_db(offset, ref) > 100).all() and (frame_psnr_db(offset, ref) < 27).all()
    flicker = ref + 0.1 * torch.tensor([1, -1, 1, -1, 1, -1]).view(6, 1, 1)
    torch.testing.assert_close(frame_psnr_db(flicker, ref), frame_psnr_db(offset, ref), atol=1e-4, rtol=0)
    # frame differences are off by 0.2 at every pixel
    expected = torch.full((2, 5), 20 * math.log10(2 / 0.2), dtype=torch.float64)
    torch.testing.assert_close(temporal_psnr_db(flicker, ref), expected, atol=1e-4, rtol=0)


def test_a_clip_that_stands_still_misses_all_motion():
    ref = squares(0, 3, 5)
    still = ref[:, :, :1].expand_as(ref)
    assert temporal_relative_l2(still, ref).tolist() == [1, 1, 1]
    assert temporal_relative_l2(ref, still).tolist() == [math.inf] * 3


def test_the_step_from_a_given_frame_to_a_made_one_counts():
    ref = clips(0, 1, 1, 4, 8, 8)
    mask = torch.ones(1, 1, 4, 8, 8)
    mask[:, :, :2] = 0
    jump = torch.where(mask.bool(), ref + 0.1, ref)  # right from then on, after one jump
    found = temporal_psnr_db(jump, ref, mask)[0]
    assert found[0].isnan() and found[2] > 100
    assert float(found[1]) == pytest.approx(20 * math.log10(2 / 0.1), abs=1e-4)
    dref = ref.double().diff(dim=2)[:, :, 1:].norm()
    assert float(temporal_relative_l2(jump, ref, mask)) == pytest.approx(0.1 * 8 / float(dref), rel=1e-5)
    assert temporal_relative_l2(jump, ref, torch.zeros_like(mask)).isnan().all()


def test_means_leave_out_what_was_given():
    shape = (2, 1, 3, 8, 8)
    ref = clips(0, *shape)
    x = ref + torch.tensor([0.5, 0.1, 0.2]).view(3, 1, 1)
    mask = torch.ones(shape)
    mask[:, :, 0] = 0
    mask[0, :, 1] = 0
    scores = clip_scores(x, ref, mask)
    at = [20 * math.log10(2 / error) for error in (0.1, 0.2)]
    by_frame = scores.by_frame()["psnr_db"]
    assert math.isnan(by_frame[0]) and by_frame[1:] == pytest.approx(at, abs=1e-4)
    assert scores.means()["psnr_db"] == pytest.approx((at[0] + 2 * at[1]) / 3, abs=1e-4)


def test_one_frame_has_no_motion():
    x, ref = clips(0, 2, 3, 1, 8, 8), clips(1, 2, 3, 1, 8, 8)
    assert set(clip_scores(x, ref).means()) == {"psnr_db", "ssim"}
    with pytest.raises(ShapeError, match=r"expected clips of 2 frames or more, got \[2, 3, 1, 8, 8\]"):
        temporal_psnr_db(x, ref)


def test_what_is_no_clip_or_no_mask_is_refused():
    x = clips(0, 2, 3, 4, 8, 8)
    with pytest.raises(ShapeError, match=r"got \[2, 3, 4, 8, 8\] and \[2, 3, 8, 8\]"):
        frame_psnr_db(x, x[:, :, 0])
    with pytest.raises(ShapeError, match=r"mask \[2, 4, 8, 8\], expected \[2, 1, 4, 8, 8\]"):
        frame_ssim(x, x, x[:, 0])
    with pytest.raises(DataError, match="other values than 0"):
        temporal_psnr_db(x, x, torch.full((2, 1, 4, 8, 8), 0.5))
    with pytest.raises(DataError, match="1 of 1536 values of the result are not finite"):
        broken = x.clone()
        broken[0, 0, 0, 0, 0] = math.nan
        clip_scores(broken, x)


@pytest.fixture(scope="module")
def pretrained() -> EfficientNetLite0:
    try:
        return load_efficientnet_lite0()
    except DataError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def untrained() -> EfficientNetLite0:
    torch.manual_seed(0)
    return EfficientNetLite0().eval()


def outputs(network: EfficientNetLite0, pictures: Tensor) -> dict[int, Tensor]:
    """Of all blocks, heard while the network runs as a whole."""
    heard: dict[int, Tensor] = {}
    hooks = [
        network.get_submodule(f"_blocks.{i}").register_forward_hook(lambda m, x, y, i=i: heard.update({i: y}))
        for i in range(16)
    ]
    with torch.no_grad():
        network(normalised(pictures))
    for hook in hooks:
        hook.remove()
    return heard


def test_feature_distance_is_equation_1_with_unit_weights(untrained):
    x, ref = clips(0, 2, 3, 20, 24), clips(1, 2, 3, 20, 24)
    of_x, of_ref = outputs(untrained, x), outputs(untrained, ref)
    expected = torch.zeros(2)
    for block in COMPARED:
        cosine = torch.nn.functional.cosine_similarity(of_x[block], of_ref[block], dim=1)
        expected += (2 - 2 * cosine).mean((1, 2))  # |a - b|^2 of unit vectors
    torch.testing.assert_close(feature_distance(untrained, x, ref), expected, rtol=1e-4, atol=1e-6)
    assert [of_x[block].shape[1:] for block in COMPARED] == [
        (16, 112, 112),
        (24, 56, 56),
        (40, 28, 28),
        (112, 14, 14),
        (320, 7, 7),
    ]
    assert {block: of_x[block].shape[1] for block in WIDTHS} == WIDTHS


def test_feature_distance_orders_as_people_do(pretrained):
    ref = squares(3, 2, 1)[:, :, 0]
    other = squares(4, 2, 1)[:, :, 0]
    noise = torch.randn(ref.shape, generator=torch.Generator().manual_seed(0))
    equal, near, far = (
        feature_distance(pretrained, x, ref) for x in (ref, ref + 0.02 * noise, ref + 0.5 * noise)
    )
    assert equal.tolist() == [0, 0]
    assert (near > 0).all() and (near < far).all() and (near < feature_distance(pretrained, other, ref)).all()


def test_frames_are_compared_one_by_one(untrained, monkeypatch):
    monkeypatch.setattr(perceptual, "FRAMES_AT_ONCE", 2)
    x, ref, seen = clips(0, 1, 1, 3, 16, 16), clips(1, 1, 1, 3, 16, 16), []
    found = frame_feature_distance(untrained, x, ref, progress=lambda *at: seen.append(at))
    one_by_one = [feature_distance(untrained, x[:, :, t], ref[:, :, t]) for t in range(3)]
    torch.testing.assert_close(found, torch.stack(one_by_one, 1), rtol=1e-4, atol=1e-6)
    assert seen == [(2, 3), (3, 3)]
    with pytest.raises(ShapeError, match="expected two clips"):
        frame_feature_distance(untrained, x, ref[:, :, :2])


def test_clip_features_are_as_defined_for_clips_longer_than_a_chunk(untrained, monkeypatch):
    assert FRAMES_AT_ONCE > 2
    monkeypatch.setattr(perceptual, "FRAMES_AT_ONCE", 2)
    clip = squares(0, 1, 5)[0]
    a = outputs(untrained, clip.transpose(0, 1))[2]
    steps = torch.stack([(a[t + 1] - a[t]).abs() for t in range(4)])
    expected = torch.cat([a.mean((0, 2, 3)), steps.mean((0, 2, 3))])
    feature = ClipFeature(block=2)
    torch.testing.assert_close(feature.extract(untrained, [clip])[0], expected, rtol=1e-4, atol=1e-6)
    assert feature.name == "efficientnet-lite0 blocks.2 mean+motion:2x24"


def test_motion_is_what_order_and_standing_still_change(pretrained):
    clip, width = squares(1, 1, 6)[0], WIDTHS[4]
    orders = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 3, 1, 5, 2, 4], [0, 0, 0, 0, 0, 0]])
    moving, shuffled, still = ClipFeature().extract(pretrained, [clip[:, order] for order in orders])
    torch.testing.assert_close(shuffled[:width], moving[:width], rtol=1e-4, atol=1e-5)
    assert (shuffled[width:] > moving[width:]).all()
    assert still[width:].abs().max() < 1e-5 < moving[width:].min()


def test_a_distance_of_clips_has_a_part_for_looks_and_one_for_motion():
    feature = ClipFeature(block=0)
    real = torch.randn(160, 32, dtype=torch.float64)
    faster = real + torch.cat([torch.zeros(16), torch.full((16,), 0.5)])
    found = feature.distance(real, faster)
    assert (found.name, found.n_real, found.n_fake) == (feature.name, 160, 160)
    assert found.looks == pytest.approx(0, abs=1e-6)
    assert found.motion == pytest.approx(16 * 0.25, rel=1e-6) == found.frechet


def test_clip_features_refuse_what_they_cannot_describe(untrained):
    assert [ClipFeature(block).clips_needed for block in (0, 2, 4, 7)] == [160, 240, 400, 800]
    with pytest.raises(ConfigError, match="2x40 needs 400 clips in each set, got 400 real and 399 generated"):
        ClipFeature().check(400, 399)
    with pytest.raises(ConfigError, match="unknown block '3'"):
        ClipFeature(3)
    with pytest.raises(DataError, match="got 0 clips"):
        ClipFeature().extract(untrained, [])
    with pytest.raises(ShapeError, match=r"T > 1, got \[3, 1, 8, 8\]"):
        ClipFeature().extract(untrained, [torch.zeros(3, 1, 8, 8)])


@pytest.mark.parametrize("block", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_distances_of_clips_order_as_their_faults_do(pretrained, monkeypatch, block):
    monkeypatch.setattr(efficientnet, "IMAGE_SIZE", 64)  # instead of 224: a twelfth of the time
    feature, g = ClipFeature(block), torch.Generator().manual_seed(3)
    n, frames = feature.clips_needed, 4
    real, other = squares(1, n, frames), squares(2, n, frames)
    noise = torch.randn(other.shape, generator=g)
    made = {
        "real": other,
        "noisy": other + 0.02 * noise,
        "noisier": other + 0.2 * noise,
        "shuffled": other[:, :, [2, 0, 3, 1]],
        "still": other[:, :, :1].expand_as(other),
    }
    known = feature.extract(pretrained, real)
    found = {
        name: feature.distance(known, feature.extract(pretrained, clips)) for name, clips in made.items()
    }
    whole = {name: distance.frechet for name, distance in found.items()}
    assert whole["real"] < whole["noisy"] < whole["noisier"]
    assert found["shuffled"].looks == pytest.approx(found["real"].looks, rel=1e-3)  # the same frames
    for fault in ("shuffled", "still"):
        assert found[fault].motion > 5 * found["real"].motion
        assert whole[fault] > 5 * whole["real"]
