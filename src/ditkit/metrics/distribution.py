"""Distances between two sets of pictures, in features of a network that is named with every number.

Features are matrices [n, D], one row a picture. FID, KID and the memorisation-informed distance come from
torchmetrics; precision and recall, which it lacks, are here.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ditkit.core.errors import ConfigError, DataError, ShapeError

PICTURES_PER_FEATURE = 5  # a covariance of D features from fewer than 5 D pictures is mostly noise
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # the defaults of torchmetrics
NEIGHBOURS = 3  # k of Kynkaanniemi et al. 2019
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Distribution:
    """Distances of `n_fake` generated pictures from `n_real` real ones.

    `fid` is over `fid_features`, and None below 5 pictures a feature; all else is over `features`.
    """

    n_real: int
    n_fake: int
    extractor: str
    features: str
    fid_features: str
    fid: float | None
    mifid: float
    kid_mean: float
    kid_std: float
    kid_subset: int
    precision: float
    recall: float


def distribution(
    real: Mapping[str, Tensor],
    fake: Mapping[str, Tensor],
    *,
    extractor: str,
    few: str = "blocks.14",
    many: str = "head",
    seed: int = 0,
) -> Distribution:
    """All distances: FID over the features `few`; MiFID, KID, precision and recall over `many`.

    `real` and `fake` map a tap's name to features [n, D]. `seed` draws KID's subsets. Raises ShapeError,
    ConfigError or DataError for features that do not fit together, are too few or are not finite.
    """
    n_real, n_fake = len(real[few]), len(fake[few])
    kid = kernel_distance(real[many], fake[many], seed=seed)
    precision, recall = precision_recall(real[many], fake[many])
    enough = min(n_real, n_fake) >= pictures_for_fid(real[few].shape[1])
    return Distribution(
        n_real=n_real,
        n_fake=n_fake,
        extractor=extractor,
        features=f"{many}:{real[many].shape[1]}",
        fid_features=f"{few}:{real[few].shape[1]}",
        fid=frechet_distance(real[few], fake[few]) if enough else None,
        # over `many`: a middle block's features are nearer than the paper's 0.1 even for unlike pictures
        mifid=memorisation_informed_distance(real[many], fake[many]),
        kid_mean=kid.mean,
        kid_std=kid.std,
        kid_subset=kid.subset,
        precision=precision,
        recall=recall,
    )


def pictures_for_fid(features: int) -> int:
    """Return the fewest pictures in each set for which an FID over that many features is computed."""
    return PICTURES_PER_FEATURE * features


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """FID (Heusel et al. 2017, eq. 6) of features [n, D].

    Raises ConfigError with fewer than 5 D pictures in a set.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, fake = _checked("FID", real, fake)
    n, features = min(len(real), len(fake)), real.shape[1]
    if n < pictures_for_fid(features):
        raise ConfigError(
            f"FID of {features} features needs {pictures_for_fid(features)} pictures in each set, "
            f"got {len(real)} real and {len(fake)} generated; use KID, or fewer features"
        )
    metric = FrechetInceptionDistance(feature=_Given(features))
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return float(metric.compute())


def memorisation_informed_distance(real: Tensor, fake: Tensor) -> float:
    """MiFID of features [n, D]: FID over the mean cosine distance from a generated row to the next real one.

    Bai et al. 2021: a mean distance of 0.1 or more counts as 1, so that it differs from FID only for
    near copies. It is computed at any n; with fewer pictures than features an FID would be as biased.
    """
    from torchmetrics.image.mifid import MemorizationInformedFrechetInceptionDistance

    real, fake = _checked("MiFID", real, fake)
    metric = MemorizationInformedFrechetInceptionDistance(feature=_Given(real.shape[1]))
    # torchmetrics averages over its "real" set, the paper over the generated one; FID itself is symmetric.
    metric.update(fake.double(), real=True)
    metric.update(real.double(), real=False)
    return float(metric.compute())


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation over random subsets of `subset` pictures each."""

    mean: float
    std: float
    subset: int


def kernel_distance(real: Tensor, fake: Tensor, *, seed: int = 0) -> KernelDistance:
    """KID (Binkowski et al. 2018): unbiased squared MMD with the kernel (x.y / D + 1)^3 of features [n, D].

    100 subsets of 1000 pictures, or of half the smaller set where it has fewer than 2000. Raises ConfigError
    below 4.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    real, fake = _checked("KID", real, fake)
    n = min(len(real), len(fake))
    if n < 4:
        raise ConfigError(f"KID needs 4 pictures in each set, got {len(real)} real and {len(fake)} generated")
    subset = min(KID_SUBSET_SIZE, n // 2)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*will save all extracted features.*")
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(_Given(real.shape[1]), subsets=KID_SUBSETS, subset_size=subset)
        metric.update(real.double(), real=True)
        metric.update(fake.double(), real=False)
        mean, std = metric.compute()
    return KernelDistance(float(mean), float(std), subset)


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eqs. 1 and 2) of features [n, D].

    Precision: the share of generated rows inside the real manifold; recall: the share of real rows inside the
    generated one. A manifold is the union of balls around its rows that reach their `neighbours`-th nearest
    other row. Raises ConfigError if a set has no such row.
    """
    real, fake = _checked("precision and recall", real, fake)
    if not 1 <= neighbours < min(len(real), len(fake)):
        raise ConfigError(
            f"precision and recall: neighbours={neighbours}, expected at least 1 and fewer than the "
            f"pictures of each set, got {len(real)} real and {len(fake)} generated"
        )
    real_radius, fake_radius = _radii(real, neighbours), _radii(fake, neighbours)
    fake_inside = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    real_inside: list[Tensor] = []
    for rows, radius in zip(real.split(ROWS_AT_ONCE), real_radius.split(ROWS_AT_ONCE), strict=True):
        distances = _distances(rows, fake)
        fake_inside |= (distances <= radius[:, None]).any(0)
        real_inside.append((distances <= fake_radius).any(1))
    return _share(fake_inside), _share(torch.cat(real_inside))


def nearest_neighbours(query: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance [n] to, and index [n] of, the nearest row of `reference`, for rows [n, ...].

    Raises ShapeError if the rows do not have one shape, DataError if values are not finite.
    """
    if query.shape[1:] != reference.shape[1:]:
        raise ShapeError(
            f"nearest_neighbours: expected rows of one shape, got {list(query.shape)} and "
            f"{list(reference.shape)}"
        )
    query, reference = _checked("nearest_neighbours", query.flatten(1), reference.flatten(1))
    found = [_distances(rows, reference).min(1) for rows in query.split(ROWS_AT_ONCE)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def _radii(rows: Tensor, neighbours: int) -> Tensor:
    """Distance of each row to its k-th nearest other row: [n, D] -> [n]."""
    # The nearest row of a row is itself, at distance 0: the k-th other one is the (k + 1)-th smallest.
    chunks = rows.split(ROWS_AT_ONCE)
    return torch.cat([_distances(c, rows).kthvalue(neighbours + 1, dim=1).values for c in chunks])


def _share(inside: Tensor) -> float:
    return int(inside.sum()) / len(inside)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # Not |a|^2 + |b|^2 - 2 a.b, whose rounding gives equal rows a distance that is not 0.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _checked(name: str, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices of one width, with rows, all finite."""
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ShapeError(
            f"{name}: expected features [n, D] twice, got {list(real.shape)} and {list(fake.shape)}"
        )
    if min(len(real), len(fake)) < 1:
        raise DataError(f"{name}: expected pictures in both sets, got {len(real)} and {len(fake)}")
    if not (real.isfinite().all() and fake.isfinite().all()):
        raise DataError(f"{name}: features hold NaN or infinite values, expected finite ones")
    return real.detach(), fake.detach()


class _Given(nn.Module):
    """The extractor handed to torchmetrics: features are computed once, for all metrics."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.num_features = features

    def forward(self, features: Tensor) -> Tensor:
        return features
