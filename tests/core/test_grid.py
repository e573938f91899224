import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditkit.core.errors import ShapeError
from ditkit.core.grid import Grid, Tokens, patchify, unpatchify

sides = st.integers(1, 5)


@given(sides, sides, sides)
def test_coordinates_are_row_major(frames, height, width):
    grid = Grid(frames, height, width)
    expected = [[t, y, x] for t in range(frames) for y in range(height) for x in range(width)]
    assert grid.coordinates().tolist() == expected
    assert grid.length == len(expected)


@given(sides, sides, sides, sides, sides)
def test_tiled_tokens_are_neighbours_in_memory(frames, tall, wide, rows, columns):
    grid = Grid(frames, tall * rows, wide * columns, tile=(rows, columns))
    expected = [
        (t * grid.height + Y * rows + y) * grid.width + X * columns + x
        for t in range(frames)
        for Y in range(tall)
        for X in range(wide)
        for y in range(rows)
        for x in range(columns)
    ]
    assert grid.tile_order().tolist() == expected


def test_without_a_tile_the_order_is_unchanged():
    assert Grid(2, 3, 4).tile_order().tolist() == list(range(24))


@pytest.mark.parametrize(
    ("size", "patch", "shape"),
    [
        ((32,), 2, (16, 1, 1)),
        ((12,), (3,), (4, 1, 1)),
        ((32, 32), 2, (1, 16, 16)),
        ((6, 4), (3, 1), (1, 2, 4)),
        ((5, 8, 4), 4, (5, 2, 1)),
        ((6, 8, 4), (2, 4, 2), (3, 2, 2)),
    ],
)
def test_the_grid_of_a_signal(size, patch, shape):
    assert Grid.of(size, patch).shape == shape


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Grid(0), "at least one token, got (0, 1, 1)"),
        (lambda: Grid(1, 4, 4, tile=(3, 2)), "tile (3, 2) does not divide 4 x 4"),
        (lambda: Grid(1, 4, 4, tile=(0, 2)), "tile (0, 2) does not divide 4 x 4"),
        (lambda: Grid.of((33, 32), 2), "height=33 does not divide into patches of 2"),
        (lambda: Grid.of((32, 31), 2), "width=31 does not divide into patches of 2"),
        (lambda: Grid.of((32, 32), 0), "height=32 does not divide into patches of 0"),
        (lambda: Grid.of((-4, 4), 2), "at least one token, got (1, -2, 2)"),
        (lambda: Grid.of((32, 32), (2,)), "patch (2,) should have one side for each axis of (32, 32)"),
        (lambda: Grid.of((2, 2, 32, 32), 2), "size (2, 2, 32, 32) should be"),
        (lambda: Grid.of((33,), 2), "frames=33 does not divide into patches of 2"),
        (lambda: patchify(torch.zeros(1, 3, 9, 8), 2), "9 x 8 does not divide into patches of 2"),
        (lambda: unpatchify(torch.zeros(1, 5, 12), Grid(1, 2, 2), 2), "5 tokens do not fill"),
        (lambda: unpatchify(torch.zeros(1, 4, 12), Grid(4), 2), "4 tokens do not fill one frame"),
        (lambda: unpatchify(torch.zeros(1, 4, 13), Grid(1, 2, 2), 2), "width 13 does not divide"),
        (
            lambda: patchify(torch.zeros(1, 3, 5, 8, 8), (2, 4, 4)),
            "5 x 8 x 8 does not divide into patches of 2",
        ),
        (
            lambda: patchify(torch.zeros(1, 3, 4, 8, 8), (4, 4)),
            "4 x 8 x 8 does not divide into patches of 4 x 4",
        ),
        (lambda: patchify(torch.zeros(1, 3, 8, 8), 0), "8 x 8 does not divide into patches of 0"),
        (
            lambda: unpatchify(torch.zeros(1, 4, 12), Grid(2), (1, 1, 1)),
            "4 tokens do not fill a grid of (2, 1, 1)",
        ),
        (lambda: unpatchify(torch.zeros(1, 2, 12), Grid(2), (1, 1)), "2 tokens do not fill one frame"),
        (
            lambda: unpatchify(torch.zeros(1, 2, 9), Grid(2), (2, 1, 2)),
            "width 9 does not divide into patches of 2 x 1",
        ),
        (
            lambda: unpatchify(torch.zeros(1, 2, 9), Grid(2), (2,)),
            "width 9 does not divide into patches of 2",
        ),
        (
            lambda: unpatchify(torch.zeros(1, 4, 6), Grid(1, 2, 2), (2,)),
            "4 tokens do not fill a grid of (1, 2, 2)",
        ),
        (
            lambda: unpatchify(torch.zeros(1, 2, 9), Grid(2), (1, 1, 1, 1)),
            "should be (frames,), (height, width)",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(make, expected):
    with pytest.raises(ShapeError) as caught:
        make()
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@given(sides, sides, st.integers(1, 3), st.integers(1, 4))
def test_patchify_flattens_like_a_strided_convolution(rows, columns, channels, patch):
    x = torch.randn(2, channels, rows * patch, columns * patch, dtype=torch.float64)
    kernel = torch.randn(7, channels, patch, patch, dtype=torch.float64)
    by_convolution = torch.nn.functional.conv2d(x, kernel, stride=patch).flatten(2).mT
    assert torch.allclose(patchify(x, patch) @ kernel.flatten(1).mT, by_convolution, atol=1e-12)


@given(sides, sides, st.integers(1, 3), st.integers(1, 4))
def test_unpatchify_puts_h_w_p_q_c_at_c_hp_wq(rows, columns, channels, patch):
    tokens = torch.randn(2, rows * columns, patch * patch * channels)
    out = unpatchify(tokens, Grid(1, rows, columns), patch)
    assert out.shape == (2, channels, rows * patch, columns * patch)
    slow = torch.full_like(out, torch.nan)
    for h in range(rows):
        for w in range(columns):
            for p in range(patch):
                for q in range(patch):
                    for c in range(channels):
                        value = tokens[:, h * columns + w, (p * patch + q) * channels + c]
                        slow[:, c, h * patch + p, w * patch + q] = value
    assert torch.equal(out, slow)


@given(sides, sides, sides, st.integers(1, 3), st.tuples(*[st.integers(1, 3)] * 3))
def test_clips_are_cut_like_a_strided_convolution_over_time_too(frames, rows, columns, channels, patch):
    size = [n * p for n, p in zip((frames, rows, columns), patch, strict=True)]
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    kernel = torch.randn(5, channels, *patch, dtype=torch.float64)
    by_convolution = torch.nn.functional.conv3d(x, kernel, stride=patch).flatten(2).mT
    assert torch.allclose(patchify(x, patch) @ kernel.flatten(1).mT, by_convolution, atol=1e-12)

    tokens = (
        patchify(x, patch).unflatten(-1, (channels, -1)).mT.flatten(2)
    )  # channels fastest, as a head has them
    assert torch.equal(unpatchify(tokens, Grid.of(tuple(size), patch), patch), x)


@given(sides, sides, sides, st.integers(1, 3))
def test_one_number_is_the_patch_of_every_frame_alone(frames, rows, columns, patch):
    clip = torch.randn(2, 3, frames, rows * patch, columns * patch)
    tokens = patchify(clip, patch).unflatten(1, (frames, -1))
    assert torch.equal(tokens, torch.stack([patchify(frame, patch) for frame in clip.unbind(2)], 1))
    assert torch.equal(patchify(clip, patch), patchify(clip, (1, patch, patch)))


def test_a_patch_of_three_sides_keeps_the_time_axis_of_one_frame():
    tokens = torch.randn(2, 6, 12)
    clip = unpatchify(tokens, Grid(1, 2, 3), (1, 2, 2))
    assert clip.shape == (2, 3, 1, 4, 6)
    assert torch.equal(clip[:, :, 0], unpatchify(tokens, Grid(1, 2, 3), 2))


def test_rows_of_tokens_take_their_positions_along():
    x, position = torch.randn(2, 6, 3), torch.randn(6, 4)
    taken = Tokens(x, position).rows("image", torch.tensor([4, 1]))
    assert taken.position is not None
    assert torch.equal(taken.x, torch.stack([x[:, 4], x[:, 1]], 1))
    assert torch.equal(taken.position, torch.stack([position[4], position[1]]))
    assert Tokens(x).rows("image", torch.tensor([0])).position is None


@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 3))
def test_a_series_is_cut_and_joined_along_its_one_axis(tokens, patch, channels):
    x = torch.randn(2, channels, tokens * patch)
    grid = Grid.of((tokens * patch,), patch)
    assert grid == Grid(tokens) and grid.sides((tokens * patch,)) == (patch,) and grid.counts(1) == (tokens,)
    cut = patchify(x, patch)
    assert torch.equal(cut, x.reshape(2, channels, tokens, patch).transpose(1, 2).flatten(2))
    fastest = cut.reshape(2, tokens, channels, patch).transpose(2, 3).flatten(2)
    assert torch.equal(unpatchify(fastest, grid, (patch,)), x)
