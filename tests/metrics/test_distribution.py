import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ditkit.core.errors import ConfigError, DataError, ShapeError
from ditkit.metrics.distribution import (
    distribution,
    frechet_distance,
    kernel_distance,
    memorisation_informed_distance,
    nearest_neighbours,
    pictures_for_fid,
    precision_recall,
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sample_with(mean: np.ndarray, covariance: np.ndarray, n: int, seed: int) -> Tensor:
    """n rows whose sample mean and sample covariance are exactly the given ones."""
    x = normal(seed, n, len(mean)).numpy()
    x -= x.mean(0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return torch.from_numpy(white @ np.linalg.cholesky(covariance).T + mean)


def root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(values.clip(0)) @ vectors.T


def frechet_reference(m1: np.ndarray, s1: np.ndarray, m2: np.ndarray, s2: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), through symmetric matrices only."""
    cross = root(root(s1) @ s2 @ root(s1))
    return float(((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * cross))


def covariance(seed: int, width: int) -> np.ndarray:
    a = normal(seed, width, width).numpy()
    return a @ a.T / width + 0.1 * np.eye(width)


def test_fid_of_two_gaussians_is_their_closed_form():
    m1, m2 = normal(0, 6).numpy(), normal(1, 6).numpy()
    s1, s2 = covariance(2, 6), covariance(3, 6)
    fid = frechet_distance(sample_with(m1, s1, 60, 4), sample_with(m2, s2, 45, 5))
    assert fid == pytest.approx(frechet_reference(m1, s1, m2, s2), rel=1e-9)


def test_fid_of_commuting_covariances_is_the_distance_of_deviations():
    a, b = np.array([1.0, 4, 9]), np.array([4.0, 1, 9])
    fid = frechet_distance(
        sample_with(np.zeros(3), np.diag(a), 30, 0), sample_with(np.full(3, 2.0), np.diag(b), 30, 1)
    )
    assert fid == pytest.approx(3 * 4 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-9)


def test_fid_is_refused_below_five_pictures_a_feature():
    assert pictures_for_fid(192) == 960  # "192 or fewer for a thousand pictures"
    enough, short = normal(0, 20, 4), normal(1, 19, 4)
    assert frechet_distance(enough, enough) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ConfigError, match="4 features needs 20 pictures in each set, got 20 real and 19"):
        frechet_distance(enough, short)


def kernel(x: Tensor, y: Tensor) -> float:
    return (float(x @ y) / len(x) + 1) ** 3


def test_kid_of_two_points_is_the_kernel_itself():
    a, b = normal(0, 5), normal(1, 5)
    kid = kernel_distance(a.expand(10, 5), b.expand(14, 5))
    assert kid.mean == pytest.approx(kernel(a, a) + kernel(b, b) - 2 * kernel(a, b), rel=1e-9)
    assert kid.std == pytest.approx(0, abs=1e-9)
    assert kid.subset == 5


def test_kid_equals_the_unbiased_estimator_written_out():
    """With four pictures and subsets of two, all subsets can be listed; KID draws 100 of them."""
    real, fake = normal(2, 4, 3), normal(3, 4, 3) + 1
    possible = [
        kernel(real[i], real[j])
        + kernel(fake[k], fake[m])
        - (
            kernel(real[i], fake[k])
            + kernel(real[i], fake[m])
            + kernel(real[j], fake[k])
            + kernel(real[j], fake[m])
        )
        / 2
        for i in range(4)
        for j in range(i)
        for k in range(4)
        for m in range(k)
    ]
    kid = kernel_distance(real, fake, seed=5)
    assert abs(kid.mean - np.mean(possible)) < 4 * np.std(possible) / math.sqrt(100)
    assert kid.std == pytest.approx(np.std(possible), rel=0.3)


def test_kid_is_centred_on_zero_for_equal_distributions():
    kid = kernel_distance(normal(0, 400, 8), normal(1, 400, 8))
    assert abs(kid.mean) < kid.std
    assert kernel_distance(normal(0, 400, 8), normal(1, 400, 8) + 1).mean > 5 * kid.std


def test_kid_depends_on_its_seed_alone():
    real, fake = normal(0, 50, 4), normal(1, 50, 4)
    state = torch.random.get_rng_state()
    first = kernel_distance(real, fake, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(123)
    assert kernel_distance(real, fake, seed=3) == first
    assert kernel_distance(real, fake, seed=4) != first


def memorisation_reference(real: np.ndarray, fake: np.ndarray) -> float:
    """Bai et al. 2021: FID over m, the mean of the generated rows' least cosine distances; m >= 0.1 is 1."""
    least = [min(1 - abs(g @ r) / np.sqrt(g @ g * (r @ r)) for r in real) for g in fake]
    distance = np.mean(least)
    fid = frechet_reference(real.mean(0), np.cov(real.T), fake.mean(0), np.cov(fake.T))
    return fid / (distance if distance < 0.1 else 1)


@pytest.mark.parametrize("noise", [0.01, 0.1, 3.0])
def test_memorisation_equals_its_definition(noise):
    real = normal(0, 60, 5)
    fake = real[:25] + noise * normal(1, 25, 5)
    mifid = memorisation_informed_distance(real, fake)
    assert mifid == pytest.approx(memorisation_reference(real.numpy(), fake.numpy()), rel=1e-6)


def test_copies_of_a_few_real_pictures_are_punished_however_many_others_there_are():
    real = normal(0, 300, 5)
    copies, fresh = real[:30] * 1.001, normal(1, 30, 5)
    assert frechet_distance(real, copies) < 2
    assert memorisation_informed_distance(real, copies) > 1e6
    assert memorisation_informed_distance(real, fresh) < 1e3


def precision_recall_reference(real: Tensor, fake: Tensor, k: int) -> tuple[float, float]:
    """Kynkaanniemi et al. 2019, eqs. 1 and 2, one pair at a time."""

    def share(query: Tensor, manifold: Tensor) -> float:
        inside = 0
        for q in query:
            for i, m in enumerate(manifold):
                others = sorted(float((m - o).norm()) for j, o in enumerate(manifold) if j != i)
                if float((q - m).norm()) <= others[k - 1]:
                    inside += 1
                    break
        return inside / len(query)

    return share(fake, real), share(real, fake)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shift", [0.0, 1.0, 2.0])
def test_precision_and_recall_equal_their_slow_twin(k, shift):
    real, fake = normal(0, 30, 3), 0.7 * normal(1, 22, 3) + shift
    assert precision_recall(real, fake, k) == pytest.approx(precision_recall_reference(real, fake, k))


def test_precision_and_recall_of_sets_whose_answer_is_known():
    a, far = normal(0, 600, 4), normal(1, 600, 4) + 100
    assert precision_recall(a, a.flip(0)) == (1, 1)
    assert precision_recall(a, far) == (0, 0)
    precision, recall = precision_recall(torch.cat([a, far]), normal(2, 600, 4))
    assert precision > 0.8  # what is drawn is real
    assert 0.4 < recall < 0.5  # one of two modes is never drawn


def test_nearest_neighbours_of_shuffled_copies_are_the_shuffle():
    images = normal(0, 300, 3, 4, 4).float()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    distance, index = nearest_neighbours(images[order], images)
    assert torch.equal(index, order)
    assert distance.tolist() == [0] * 300


def test_nearest_neighbours_equal_a_search_by_hand():
    query, reference = normal(0, 7, 5), normal(1, 11, 5)
    distance, index = nearest_neighbours(query, reference)
    for q, d, i in zip(query, distance, index, strict=True):
        all_distances = [float((q - r).norm()) for r in reference]
        assert all_distances[i] == min(all_distances) == pytest.approx(float(d))


def test_distribution_names_what_it_used_and_leaves_out_an_fid_of_too_few():
    real = {"few": normal(0, 60, 4), "many": normal(1, 60, 40)}
    fake = {"few": normal(2, 20, 4), "many": normal(3, 20, 40)}
    full = distribution(real, fake, extractor="noise", few="few", many="many")
    assert (full.n_real, full.n_fake, full.extractor) == (60, 20, "noise")
    assert (full.fid_features, full.features, full.kid_subset) == ("few:4", "many:40", 10)
    assert full.fid == frechet_distance(real["few"], fake["few"])
    assert full.mifid == memorisation_informed_distance(real["many"], fake["many"])
    fewer = {tap: rows[:19] for tap, rows in fake.items()}
    short = distribution(real, fewer, extractor="noise", few="few", many="many")
    assert short.fid is None
    assert math.isfinite(short.mifid) and math.isfinite(short.kid_mean)


@pytest.mark.parametrize(
    "measure",
    [frechet_distance, kernel_distance, memorisation_informed_distance, precision_recall, nearest_neighbours],
)
def test_bad_features_are_refused(measure):
    good, broken = normal(0, 30, 3), normal(1, 30, 3)
    broken[4, 1] = math.inf
    with pytest.raises(ShapeError, match=r"\[30, 3\] (twice, got )?.*\[30, 2\]"):
        measure(good, good[:, :2])
    with pytest.raises(DataError, match="NaN or infinite"):
        measure(good, broken)
    with pytest.raises(DataError, match="got 30 and 0"):
        measure(good, good[:0])


def test_too_few_pictures_are_refused():
    few = normal(0, 3, 2)
    with pytest.raises(ConfigError, match="KID needs 4 pictures in each set, got 3 real and 3"):
        kernel_distance(few, few)
    with pytest.raises(ConfigError, match="neighbours=3"):
        precision_recall(few, few)
