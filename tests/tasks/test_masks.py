"""What each kind of mask gives, counted, at any length and size."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from ditkit.core.errors import ConfigError
from ditkit.tasks.video.masks import KINDS, TEMPORAL, MaskMixture, mask_kind

sizes = st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(1, 12))
seeds = st.integers(0, 2**32 - 1)


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def given_frames(mask: Tensor) -> list[int]:
    """Frames of [1, T, H, W] that are given whole; all others must be made whole."""
    made = mask[0].flatten(1)
    assert torch.equal(made.all(1), made.any(1))
    return (~made.any(1)).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("name", "frames", "expected"),
    [
        ("predict", 16, range(8)),
        ("backward", 16, range(8, 16)),
        ("interpolate", 16, (0, 4, 8, 12)),
        ("unconditional", 16, ()),
        ("first-frame", 16, (0,)),
        ("first-last", 16, (0, 15)),
        ("predict", 7, (0, 1, 2)),
        ("backward", 7, (4, 5, 6)),
        ("interpolate", 10, (0, 4, 8)),
        ("interpolate", 3, (0,)),
        ("predict", 2, (0,)),
        ("backward", 2, (1,)),
        ("first-last", 3, (0, 2)),
        ("unconditional", 1, ()),
    ],
)
def test_the_given_frames_of_each_kind(name, frames, expected):
    mask = KINDS[name]((frames, 3, 5), generator())
    assert mask.shape == (1, frames, 3, 5) and mask.dtype == torch.bool
    assert given_frames(mask) == list(expected)


def test_a_single_frame_is_every_frame_at_times():
    drawn = [given_frames(KINDS["single-frame"]((5, 2, 2), generator(seed))) for seed in range(100)]
    assert {tuple(frames) for frames in drawn} == {(0,), (1,), (2,), (3,), (4,)}


def test_random_frames_are_made_four_times_in_five():
    n, T = 500, 16
    counts = [len(given_frames(KINDS["random-frames"]((T, 1, 1), generator(seed)))) for seed in range(n)]
    assert min(counts) >= 1 and max(counts) < T
    # at least one is given: the mean of a binomial without its chance of none
    expected = T * 0.2 / (1 - 0.8**T)
    assert sum(counts) / n == pytest.approx(expected, abs=5 * (T * 0.16 / n) ** 0.5)


def region_parts(mask: Tensor) -> tuple[int, int, Tensor]:
    """Given frames before and after the region, and its cells [H, W], the same in every frame between."""
    touched = mask[0].flatten(1).any(1).nonzero().flatten().tolist()
    assert touched == list(range(touched[0], touched[-1] + 1))
    inner = mask[0, touched[0] : touched[-1] + 1]
    assert torch.equal(inner, inner[:1].expand_as(inner))
    return touched[0], mask.shape[1] - 1 - touched[-1], inner[0]


@given(sizes.filter(lambda size: size[1] * size[2] > 1), seeds)
def test_a_region_covers_up_to_half_of_some_frame_and_is_never_empty(size, seed):
    before, after, cells = region_parts(KINDS["region"](size, generator(seed)))
    assert 0 <= before <= 3 and 0 <= after <= 3
    assert 1 <= cells.sum() <= size[1] * size[2] // 2


def test_a_region_of_the_papers_size_covers_nearly_half_and_leaves_either_end_whole_or_not():
    """`mask[a:-b]` is empty at b = 0: there the reference trains on nothing."""
    ends, shares, blocks = Counter(), [], set()
    for seed in range(200):
        before, after, cells = region_parts(KINDS["region"]((16, 16, 16), generator(seed)))
        ends[before, after] += 1
        shares.append(cells.float().mean().item())
        blocks.add(tuple(cells.flatten().tolist()))
    assert {end for end, _ in ends} == {end for _, end in ends} == {0, 1, 2, 3}
    assert sum(shares) / len(shares) > 0.4 and max(shares) <= 0.5
    assert len(blocks) == 200


@pytest.mark.parametrize("name", KINDS)
@given(sizes, seeds)
def test_every_kind_gives_some_and_leaves_some_at_any_size_it_takes(name, size, seed):
    kind = KINDS[name]
    if not kind.fits(size):
        with pytest.raises(ConfigError) as caught:
            kind(size, generator(seed))
        T, H, W = size
        assert str(caught.value).endswith(f"got {T} of {H} x {W}") and repr(name) in str(caught.value)
        return
    mask = kind(size, generator(seed))
    assert mask.shape == (1, *size) and mask.dtype == torch.bool and mask.any()
    assert mask.all() == (name == "unconditional")
    assert torch.equal(kind(size, generator(seed)), mask)
    assert mask.untyped_storage().nbytes() == mask.numel()  # its own memory, to be written to


def test_the_mixture_is_the_papers():
    mixture, n = MaskMixture(), 4000
    drawn = Counter(mixture.kind((16, 8, 8), generator(seed)).name for seed in range(n))
    assert set(drawn) == {*TEMPORAL, "region"} and len(TEMPORAL) == 6
    for name, count in drawn.items():
        share = 0.2 if name == "region" else 0.8 / 6
        assert count / n == pytest.approx(share, abs=5 * (share * (1 - share) / n) ** 0.5)


def test_every_sample_of_a_batch_has_its_own_mask_whatever_stands_beside_it():
    mixture, size = MaskMixture(), (16, 8, 8)
    masks = mixture.masks(size, [generator(seed) for seed in range(12)])
    assert masks.shape == (12, 1, 16, 8, 8) and masks.dtype == torch.bool
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 6
    assert torch.equal(mixture.masks(size, [generator(7)])[0], masks[7])


def test_a_mixture_of_one_task_is_that_task():
    masks = MaskMixture(region=0, frames=("predict",)).masks((6, 2, 2), [generator(s) for s in range(9)])
    assert all(given_frames(mask) == [0, 1, 2] for mask in masks)
    assert MaskMixture(region=1, frames=()).kind((6, 4, 4), generator()).name == "region"


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1, 8, 8), {"unconditional", "region"}), ((8, 1, 1), set(TEMPORAL)), ((1, 1, 1), {"unconditional"})],
)
def test_tasks_that_a_clip_is_too_short_or_small_for_are_left_out(size, expected):
    drawn = {MaskMixture().kind(size, generator(seed)).name for seed in range(200)}
    assert drawn == expected


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: mask_kind("predit"), "unknown mask 'predit'; did you mean 'predict'?"),
        (lambda: MaskMixture(region=1.5), "region=1.5 should lie in [0, 1]"),
        (lambda: MaskMixture(frames=()), "region=0.2 without other frames, expected 1"),
        (lambda: MaskMixture(frames=("first",)), "unknown mask 'first'; did you mean"),
        (
            lambda: MaskMixture(0.2, ("predict",)).kind((1, 1, 1), generator()),
            "clips of (1, 1, 1) (frames, height, width) fit none",
        ),
        (
            lambda: KINDS["predict"]((1, 8, 8), generator()),
            "mask 'predict' needs 2 frames of 1 cells or more",
        ),
    ],
)
def test_what_makes_no_mask_is_refused_in_one_line(make, expected):
    with pytest.raises(ConfigError) as caught:
        make()
    assert expected in str(caught.value) and "\n" not in str(caught.value)
