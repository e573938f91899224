"""Distances between a result and its reference, one number a sample.

B batch, C channels, H W height and width. Signals lie in [-1, 1]: the data range of PSNR and SSIM is 2.
Nothing is clipped here; a caller who compares pictures as they are shown clips both first.
"""

from __future__ import annotations

from torch import Tensor, where

from ditkit.core.errors import DataError, ShapeError

DATA_RANGE = 2.0
SSIM_PADDING = 5  # half of the 11-tap window; reflection needs more pixels than that on each side


def psnr_db(x: Tensor, ref: Tensor) -> Tensor:
    """Peak signal-to-noise ratio 10 log10(2^2 / mean (x - ref)^2): [B, ...] -> [B] in dB, inf where equal.

    Raises ShapeError for unequal shapes and DataError for values that are not finite.
    """
    x, ref = _checked("psnr_db", x, ref)
    mean_square = (x - ref).square().flatten(1).mean(1)
    return 10 * (DATA_RANGE**2 / mean_square).log10()


def relative_l2(x: Tensor, ref: Tensor) -> Tensor:
    """||x - ref|| / ||ref||: [B, ...] -> [B], 0 where equal, inf where only the reference is all zero.

    Raises ShapeError for unequal shapes and DataError for values that are not finite.
    """
    x, ref = _checked("relative_l2", x, ref)
    difference = (x - ref).flatten(1).norm(dim=1)
    return where(difference == 0, difference, difference / ref.flatten(1).norm(dim=1))


def ssim(x: Tensor, ref: Tensor) -> Tensor:
    """Structural similarity: [B, C, H, W] -> [B], the mean of `ssim_map` over pixels and channels, 1 where equal."""
    return ssim_map(x, ref).flatten(1).mean(1)


def ssim_map(x: Tensor, ref: Tensor) -> Tensor:
    """Structural similarity about every pixel (Wang et al. 2004, eq. 13): [B, C, H, W] -> the same shape.

    Gaussian window of 11 taps, sigma 1.5, K1 = 0.01, K2 = 0.03, borders reflected. Raises ShapeError for
    unequal shapes or pictures of fewer than 6 pixels a side, DataError for values not finite.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, ref = _checked("ssim", x, ref)
    if x.ndim != 4 or min(x.shape[2:]) <= SSIM_PADDING:
        raise ShapeError(
            f"ssim: expected [B, C, H, W] with H, W > {SSIM_PADDING} (half the window), got {list(x.shape)}"
        )
    _, values = structural_similarity_index_measure(
        x,
        ref,
        sigma=1.5,
        kernel_size=11,
        k1=0.01,
        k2=0.03,
        data_range=DATA_RANGE,
        reduction="none",
        return_full_image=True,
    )
    return values


def _checked(name: str, x: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64: equal shapes of at least two axes, at least one value, all finite."""
    if x.shape != ref.shape or x.ndim < 2 or x.numel() == 0:
        raise ShapeError(
            f"{name}: expected two tensors [B, ...] of one shape, got {list(x.shape)} and {list(ref.shape)}"
        )
    for role, tensor in (("result", x), ("reference", ref)):
        if broken := int((~tensor.isfinite()).sum()):
            raise DataError(
                f"{name}: {broken} of {tensor.numel()} values of the {role} are not finite, expected none"
            )
    return x.double(), ref.double()
