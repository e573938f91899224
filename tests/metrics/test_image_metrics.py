import math

import numpy as np
import pytest
import torch

from ditkit.core.errors import DataError, ShapeError
from ditkit.metrics.image import psnr_db, relative_l2, ssim


def pictures(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def ssim_reference(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004, eq. 13, window by window: [C, H, W] in [-1, 1]; the truth for the test below."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    x, y = (np.pad(a, ((0, 0), (5, 5), (5, 5)), mode="reflect") for a in (x, y))
    values = []
    for c in range(x.shape[0]):
        for i in range(x.shape[1] - 10):
            for j in range(x.shape[2] - 10):
                a, b = x[c, i : i + 11, j : j + 11], y[c, i : i + 11, j : j + 11]
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
                cov = (window * (a - mean_a) * (b - mean_b)).sum()
                luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
                values.append(luminance * (2 * cov + c2) / (var_a + var_b + c2))
    return float(np.mean(values))


def test_psnr_of_a_constant_offset_is_known_for_each_sample():
    ref = pictures(0, 3, 2, 8, 8).double()
    offset = torch.tensor([0.1, 0.02, 2.0], dtype=torch.float64)
    expected = 20 * torch.log10(2 / offset)
    torch.testing.assert_close(psnr_db(ref + offset[:, None, None, None], ref), expected)


def test_equal_results_are_infinitely_good_exactly():
    x = pictures(1, 2, 3, 32, 32)
    assert psnr_db(x, x).tolist() == [math.inf, math.inf]
    assert relative_l2(x, x).tolist() == [0, 0]
    assert ssim(x, x).tolist() == [1, 1]


def test_relative_l2_does_not_depend_on_scale_and_takes_any_rank():
    ref, x = pictures(2, 4, 3, 2, 8, 8), pictures(3, 4, 3, 2, 8, 8)
    torch.testing.assert_close(relative_l2(1.25 * ref, ref), torch.full((4,), 0.25, dtype=torch.float64))
    torch.testing.assert_close(relative_l2(0.5 * x, 0.5 * ref), relative_l2(x, ref))


def test_relative_l2_to_an_empty_reference():
    zero = torch.zeros(2, 4)
    x = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0]])
    assert relative_l2(x, zero).tolist() == [0, math.inf]


@pytest.mark.parametrize("size", [(32, 32), (13, 7)])
def test_ssim_equals_its_slow_twin_for_each_sample(size):
    ref = pictures(4, 2, 3, *size)
    x = (ref + 0.3 * pictures(5, 2, 3, *size)).clamp(-1, 1)
    expected = [ssim_reference(a.double().numpy(), b.double().numpy()) for a, b in zip(x, ref, strict=True)]
    assert ssim(x, ref).tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("metric", [psnr_db, relative_l2, ssim])
def test_bad_input_is_refused_in_one_line(metric):
    x = pictures(6, 2, 3, 16, 16)
    broken = x.clone()
    broken[1, 0, 3, 3] = math.nan
    with pytest.raises(ShapeError, match=r"\[2, 3, 16, 16\] and \[2, 1, 16, 16\]"):
        metric(x, x[:, :1])
    with pytest.raises(DataError, match="1 of 1536 values of the result") as caught:
        metric(broken, x)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="reference"):
        metric(x, broken)


def test_ssim_refuses_pictures_smaller_than_half_its_window():
    with pytest.raises(ShapeError, match=r"H, W > 5 .* got \[1, 3, 5, 9\]"):
        ssim(pictures(7, 1, 3, 5, 9), pictures(8, 1, 3, 5, 9))
