"""Claims of Temporal Feature Matters, tried on the shipped fashion-dit in W4A8 against TFMQ-DM, on which it stands.

python benchmarks/claims/28_temporal_feature_matters.py      writes its file in benchmarks/results/claims

All arms round the data path to the nearest, so that they differ in the temporal features alone; calibration and seeds
are the same. Intervals resample seeds, or features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

import ditkit
from ditkit.bench.claims import write
from ditkit.bench.paired import bootstrap
from ditkit.compress import Calibration, TemporalFeatures, recording
from ditkit.compress.features import temporal_features
from ditkit.core.model import Model
from ditkit.systems.claims import Claim

SMALL = "fashion-dit, W4A8, DDIM without guidance"
ARMS: dict[str, dict[str, Any]] = {
    "nothing": {"strategies": ("tib",), "iterations": 1, "rate": 1e-9},
    "TFMQ": {"strategies": ("tib",)},
    "cache": {"strategies": ("cache",)},
    "selection": {"strategies": ("tib", "cache")},
}
"""The first leaves the time path as nearest rounding does: hard rounding of the first alpha is that."""


def calls_of(model: Model, seeds: range, steps: int, guidance: float = 1.0) -> list[Mapping[str, Any]]:
    """The calls of the network along trajectories."""
    with recording(model, len(seeds)) as calls:
        ditkit.generate(model, seeds=seeds, steps=steps, batch_size=len(seeds), guidance=guidance)
    return calls


def trajectory_error(calls: list[Mapping[str, Any]], full: list[Mapping[str, Any]]) -> Tensor:
    """Mean over the evaluations of |x^q - x| / |x|, of each sample."""
    pairs = [(own["x"].flatten(1), exact["x"].flatten(1)) for own, exact in zip(calls, full, strict=True)]
    return torch.stack([(a - b).norm(dim=1) / b.norm(dim=1) for a, b in pairs]).mean(0)


def main(
    samples: int = 16, seeds: int = 12, steps: int = 20, iterations: int = 200, rate: float = 1e-2
) -> None:
    """Try the claims.

    Args:
        samples: of calibration. seeds: that are judged. steps: of the schedule. iterations, rate: of maintenance.
    """
    torch.set_num_threads(1)
    model: Any = ditkit.load("fashion-dit")
    calibration = Calibration(tuple(calls_of(model, range(1000, 1000 + samples), steps, guidance=2.0)))
    full = calls_of(model, range(seeds), steps)
    setting = TemporalFeatures(weights=4, iterations=iterations, rate=rate, kernel="fbgemm", interval=1)
    error, distance, report = {}, {}, dict[str, Any]()
    for name, fields in ARMS.items():
        settled: Any = replace(setting, **fields).resolved(model, calibration)
        selection = vars(settled)["_selection"]
        own: Any = model.with_weights(model.state_dict(), "copy")
        report[name] = selection
        nearest = replace(settled, rounding="nearest")
        object.__setattr__(nearest, "_selection", selection)
        nearest.apply(own, calibration)
        error[name] = trajectory_error(calls_of(own.eval(), range(seeds), steps), full)
        distance[name] = deployed(own, model, settled.features, calibration)
        print(name, f"{error[name].mean():.5f}", selection.report, flush=True)
    write("28-temporal-feature-matters", judged(error, distance, report))


def deployed(own: Any, model: Any, layers: Sequence[str], calibration: Calibration) -> Tensor:
    """1 - cosine to full precision of the features that a compressed model gives its blocks, of each layer and row."""
    found, exact = (temporal_features(one, layers, list(calibration.calls)) for one in (own, model))
    return 1 - torch.stack([F.cosine_similarity(found[n].double(), exact[n].double(), -1) for n in layers])


def judged(
    error: Mapping[str, Tensor], distance: Mapping[str, Tensor], found: Mapping[str, Any]
) -> list[Claim]:
    means = f"{SMALL}; " + ", ".join(f"{name} {v.mean():.5f}" for name, v in error.items())
    claims = []
    for arm, rival, paper in (
        ("selection", "TFMQ", "SD-XL, W4A8: FID lower by 5.61 than the method before"),
        ("cache", "TFMQ", "the order selection <= cache <= maintained <= none"),
        ("TFMQ", "nothing", "the order selection <= cache <= maintained <= none"),
    ):
        difference = error[arm] - error[rival]
        claims.append(
            Claim.tried(
                f"The trajectory of {arm} is nearer to full precision than of {rival}",
                paper=paper,
                ours=difference.mean().item(),
                interval=bootstrap(difference),
                claimed=(None, 0.0),
                unit="of |x|",
                against=means,
            )
        )
    both = found["selection"]
    for rival in ("TFMQ", "cache"):
        gain = (distance["selection"] - distance[rival]).mean(1)  # of each layer
        claims.append(
            Claim.tried(
                f"Blocks get features that are nearer to full precision than of {rival}",
                paper="disturbance-aware: whichever strategy is nearer, for each step and layer",
                ours=gain.mean().item(),
                interval=bootstrap(gain),
                claimed=(None, 0.0),
                unit="of 1 - cosine",
                against=f"looked up {both.looked_up.float().mean():.3f} of {both.looked_up.numel()} steps and layers; "
                + ", ".join(f"{name} {v.mean():.2e}" for name, v in distance.items()),
            )
        )
    share = both.report["cache_seconds"] / both.report["maintenance_seconds"]
    claims.append(
        Claim.tried(
            "Caching takes less than a twentieth of the time of maintenance",
            paper="no training, against 20,000 iterations",
            ours=share,
            interval=(share, share),
            claimed=(None, 0.05),
            unit="of the seconds",
            against=f"{both.report['cache_seconds']} s against {both.report['maintenance_seconds']} s of far fewer "
            "iterations than the paper's",
        )
    )
    claims.append(
        Claim.untried(
            "The quantised model is 2.20 times faster on a CPU and 5.76 on a GPU",
            paper="2.20 and 5.76 times",
            reason="takes a deployment engine and SD-XL; this processor has no instructions for int8",
        )
    )
    return claims


if __name__ == "__main__":
    tyro.cli(main)
