"""Scores of satellite series, and filling without learning, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from ditkit.core.errors import DataError, ShapeError
from ditkit.metrics.gap_filling import FILLINGS, closest, last, linear
from ditkit.metrics.spectral import change_scores, image_scores, scores_by_series, spectral_angle_deg


def test_the_angle_of_a_scaled_spectrum_is_0_and_of_others_by_definition():
    x = torch.rand(2, 6, 4, 5, 5).double() + 0.01
    assert spectral_angle_deg(x, 3.7 * x).max() < 1e-6
    assert spectral_angle_deg(x, x).shape == (2, 4, 5, 5)
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    assert spectral_angle_deg(a.view(1, 2, 1), b.view(1, 2, 1)).item() == pytest.approx(45)
    black = torch.zeros(1, 2, 1)
    assert (
        spectral_angle_deg(black, black).item() == 0
        and spectral_angle_deg(black, b.view(1, 2, 1)).item() == 90
    )
    other = torch.rand_like(x)
    cosine = (x * other).sum(1) / x.norm(dim=1) / other.norm(dim=1)
    torch.testing.assert_close(
        spectral_angle_deg(x, other), cosine.arccos() * 180 / math.pi, atol=1e-5, rtol=0
    )
    with pytest.raises(ShapeError):
        spectral_angle_deg(x, x[:, :1])


def test_psnr_and_rmse_agree_and_count_only_what_is_asked():
    truth = torch.rand(3, 4, 2, 8, 8) * 2 - 1
    found = (truth + 0.1 * torch.randn_like(truth)).clamp(-1, 1)
    by_series = scores_by_series(found, truth)
    reflectances = [(x + 1) / 2 for x in (found, truth)]
    rmse = (reflectances[0] - reflectances[1]).double().square().flatten(1).mean(1).sqrt()
    torch.testing.assert_close(by_series["rmse"], rmse)
    torch.testing.assert_close(by_series["psnr_db"], -20 * rmse.log10())
    torch.testing.assert_close(
        by_series["mae"], (reflectances[0] - reflectances[1]).double().abs().flatten(1).mean(1)
    )
    counted = torch.zeros(3, 1, 2, 8, 8, dtype=torch.bool)
    counted[:, :, :, :2] = True
    elsewhere = torch.where(counted, found, -found)
    part, same = image_scores(found, truth, counted), image_scores(elsewhere, truth, counted)
    for name in ("psnr_db", "rmse", "mae", "sam_deg"):  # the window of SSIM sees what is beside, too
        assert getattr(part, name) == getattr(same, name)
    perfect = image_scores(truth, truth)
    assert (perfect.ssim, perfect.rmse, perfect.sam_deg) == (1.0, 0.0, 0.0) and perfect.psnr_db == math.inf
    with pytest.raises(DataError, match="no pixel counts"):
        image_scores(found, truth, torch.zeros_like(counted))


# A ramp 2 t over days 0, 1, 4, 10; only the dates of days 1 and 10 are clear.
DAYS = torch.tensor([[0.0, 1.0, 4.0, 10.0]])
RAMP = (2 * DAYS).view(1, 1, 4, 1, 1).expand(1, 2, 4, 1, 1)
GAPS = torch.tensor([1, 0, 1, 0]).bool().view(1, 1, 4, 1, 1)


def test_the_baselines_have_their_closed_forms_on_a_ramp():
    found = {name: fill(RAMP, GAPS, DAYS)[0, 0, :, 0, 0].tolist() for name, fill in FILLINGS.items()}
    assert found["last"] == [2, 2, 2, 20]
    assert found["closest"] == [2, 2, 2, 20]  # day 4 is 3 days from day 1, and 6 from day 10
    assert found["linear"] == pytest.approx([2, 2, 8, 20])
    late = torch.tensor([[0.0, 1.0, 7.0, 10.0]])
    assert closest(RAMP, GAPS, late)[0, 0, 2].item() == 20
    tie = torch.tensor([[0.0, 1.0, 5.5, 10.0]])
    assert closest(RAMP, GAPS, tie)[0, 0, 2].item() == 2
    assert linear(RAMP, GAPS, late)[0, 0, 2].item() == pytest.approx(2 + 18 * 6 / 9)


@pytest.mark.parametrize("name", FILLINGS)
def test_baselines_keep_what_is_clear_and_read_nothing_that_is_hidden(name):
    image, hidden = torch.rand(2, 3, 5, 6, 6), torch.rand(2, 1, 5, 6, 6) < 0.7
    hidden[0, :, :, 0, 0] = True
    days = torch.tensor([[0.0, 3, 4, 9, 20], [0, 1, 2, 3, 4]])
    found = FILLINGS[name](image, hidden, days)
    assert torch.equal(found.masked_select(~hidden), image.masked_select(~hidden))
    assert torch.equal(FILLINGS[name](image.masked_fill(hidden, float("nan")), hidden, days), found)
    mean = torch.stack([band.masked_select(~hidden[0, 0]).mean() for band in image[0]])
    torch.testing.assert_close(found[0, :, :, 0, 0], mean[:, None].expand(3, 5))
    nothing = FILLINGS[name](image, torch.ones_like(hidden), days)
    assert not nothing.any()
    with pytest.raises(ShapeError, match="gap filling"):
        last(image, hidden[:, :, :2], days)


def test_change_scores_are_those_of_maps_counted_by_hand():
    truth = torch.tensor([[[[0, 0, 1, 1]], [[0, 1, 1, 2]]]])
    maps = torch.tensor([[[[0, 0, 1, 1]], [[0, 1, 0, 0]]]])
    found = change_scores(maps, truth, 3)
    assert found.bc == pytest.approx(2 / 3)  # truth: pixels 1 and 3; found: 1, 2 and 3
    assert found.sc == pytest.approx((1 / 1 + 0 / 1) / 2)  # of the two: class 1 is right, class 2 missed
    assert found.scs == (found.bc + found.sc) / 2
    assert found.miou == pytest.approx((3 / 5 + 3 / 4 + 0 / 1) / 3)
    same = change_scores(truth, truth, 3)
    assert (same.miou, same.bc, same.sc, same.scs) == (1, 1, 1, 1)
    unknown = truth.clone()
    unknown[..., 3] = -1
    assert change_scores(maps, unknown, 3).bc == pytest.approx(1 / 2)
    still = change_scores(truth[:, :1].expand(1, 2, 1, 4), truth[:, :1].expand(1, 2, 1, 4), 3)
    assert math.isnan(still.bc) and math.isnan(still.scs) and still.miou == 1
    with pytest.raises(DataError, match="classes up to 3, expected 0 to 2"):
        change_scores(maps + 2, truth, 3)
    with pytest.raises(ShapeError, match="T > 1"):
        change_scores(maps[:, :1], truth[:, :1], 3)
