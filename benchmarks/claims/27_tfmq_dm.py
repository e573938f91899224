"""Claims of TFMQ-DM, tried on the shipped fashion-dit: ways to round its weights to 4 bits, and activations.

python benchmarks/claims/27_tfmq_dm.py      writes benchmarks/results/claims/27-tfmq-dm.json and fills the page

All arms are fitted to the same calibration, the network's own trajectories, and draw the same seeds. A trajectory's
error is the mean over its steps of |x_t^q - x_t| / |x_t|, for each seed; intervals resample seeds.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

import ditkit
from ditkit.bench.claims import write
from ditkit.bench.paired import bootstrap
from ditkit.compress import Calibration, TemporalMaintenance, recording
from ditkit.compress.features import cosines, mistaken, temporal_features
from ditkit.core.cond import Cond
from ditkit.core.model import Model
from ditkit.ops.int8_linear.kernels import wide_sums
from ditkit.systems.claims import Claim

STEPS = 50
SMALL = "fashion-dit, W4A8, DDIM of 50 steps without guidance"


def calls_of(model: Model, seeds: range, guidance: float = 1.0) -> list[Mapping[str, Any]]:
    """The calls of the network along trajectories; with guidance, of both lanes."""
    with recording(model, len(seeds)) as calls:
        ditkit.generate(model, seeds=seeds, steps=STEPS, batch_size=len(seeds), guidance=guidance)
    return calls


def trajectory_error(calls: list[Mapping[str, Any]], full: list[Mapping[str, Any]]) -> Tensor:
    """Mean over the evaluations of |x^q - x| / |x|, of each sample."""
    pairs = [(own["x"].flatten(1), exact["x"].flatten(1)) for own, exact in zip(calls, full, strict=True)]
    return torch.stack([(a - b).norm(dim=1) / b.norm(dim=1) for a, b in pairs]).mean(0)


def grid_of(model: Model, times: tuple[float, ...], labels: int) -> list[Mapping[str, Any]]:
    """A call at each time with every class, of one sample."""
    x = torch.zeros(labels, *model.sample_shape)
    return [{"x": x, "t": torch.full((labels,), t), "cond": Cond(label=torch.arange(labels))} for t in times]


def by_label(features: Mapping[str, Tensor], labels: int) -> Iterator[Mapping[str, Tensor]]:
    """Features over the times of one class after another."""
    for label in range(labels):
        yield {name: v[label::labels] for name, v in features.items()}


def compared(
    claim: str,
    paper: str,
    arm: Tensor,
    rival: Tensor,
    against: str,
    claimed: tuple[float | None, float | None],
) -> Claim:
    difference = arm - rival
    return Claim.tried(
        claim,
        paper=paper,
        ours=difference.mean().item(),
        interval=bootstrap(difference),
        claimed=claimed,
        unit="of |x|" if "trajector" in claim else "of the cosine",
        against=against,
    )


def clock(model: Model, folder: Path, rounds: int) -> tuple[dict[str, float], dict[str, int]]:
    """Core seconds of an evaluation of 16 samples, and bytes of the saved weights, by type."""
    models: dict[str, Any] = {
        "float32": model,
        "bf16": model.with_weights(model.state_dict(), "copy").to(torch.bfloat16),
    }
    for name, activations in (("W8A8", 8), ("W8A7", 7)):
        setting = TemporalMaintenance(
            rounding="nearest", activations=activations, ranges="rows", samples=16, steps=2, interval=1
        )
        models[name] = ditkit.compress(model, setting)
    x, t, cond = torch.randn(16, 1, 32, 32), torch.full((16,), 500.0), Cond(label=torch.arange(16) % 10)
    spent: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for name, one in models.items():
                given = x.bfloat16() if name == "bf16" else x
                begin = time.process_time()
                one(given, t, cond)
                if turn:
                    spent[name].append(time.process_time() - begin)
    stored = {}
    for name, one in models.items():
        dtype = torch.bfloat16 if name == "bf16" else None
        stored[name] = (one.save(folder / name, dtype) / "model.safetensors").stat().st_size
    return {name: statistics.median(seconds) for name, seconds in spent.items()}, stored


def of_size_and_speed(model: Model, rounds: int) -> Iterator[Claim]:
    with tempfile.TemporaryDirectory() as folder:
        seconds, stored = clock(model, Path(folder), rounds)
    print(seconds, stored, flush=True)
    share = stored["W8A8"] / stored["float32"]
    yield Claim.tried(
        "W8A8 takes a quarter of the bytes of float32",
        paper="822 of 3279 MB, 0.251",
        ours=share,
        interval=(share, share),
        claimed=(0.24, 0.30),
        unit="of float32",
        against="saved weights of fashion-dit; "
        + ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in stored.items()),
    )
    measured = ", ".join(f"{name} {1e3 * value:.0f} ms" for name, value in seconds.items())
    if wide_sums():
        ratio = seconds["float32"] / seconds["W8A8"]
        yield Claim.tried(
            "W8A8 is faster than float32",
            paper="81.01 against 34.07 s, 2.38 times (OpenVINO, Xeon 6248R)",
            ours=ratio,
            interval=(ratio, ratio),
            claimed=(1.3, None),
            unit="times",
            against=f"an evaluation of 16 samples, one thread: {measured}",
        )
        return
    yield Claim.untried(
        "W8A8 is faster than float32",
        paper="81.01 against 34.07 s, 2.38 times (OpenVINO, Xeon 6248R)",
        reason="this processor has no instructions for int8, so its clock is reported and not judged: an evaluation of "
        f"16 samples takes {measured} of one core",
    )


def untried() -> Iterator[Claim]:
    yield Claim.untried(
        "FID of LDM on ImageNet in W4A8 is that of full precision or less",
        paper="10.29 against 10.91 (Q-Diffusion and PTQD are above)",
        reason="takes ImageNet, the published weights and a GPU",
    )
    yield Claim.untried(
        "Calibration is twice as fast as of earlier methods",
        paper="2.0 times on Bedrooms",
        reason="their code reconstructs U-Nets on a GPU; here all arms share one loop, and calibration is the same",
    )


def main(
    samples: int = 16,
    seeds: int = 12,
    interval: int = 10,
    iterations: int = 60,
    rate: float = 3e-2,
    rounds: int = 8,
) -> None:
    """Try the claims.

    Args:
        samples: of calibration. seeds: that are judged. interval: of calibrated steps. iterations, rate: of learning.
        rounds: of the clock.
    """
    torch.set_num_threads(1)
    model: Any = ditkit.load("fashion-dit")
    calibration = Calibration(tuple(calls_of(model, range(1000, 1000 + samples), guidance=2.0)))
    full = calls_of(model, range(seeds))
    setting = TemporalMaintenance(
        weights=4, interval=interval, iterations=iterations, rate=rate, batch=16, kernel="fbgemm"
    )
    changed: dict[str, dict[str, Any]] = {
        "nearest": {"rounding": "nearest"},
        "blocks": {"time": "blocks"},
        "frozen": {"time": "frozen"},
        "maintained": {},
        "one range": {"rounding": "nearest", "ranges": "one"},
    }
    labels = model.config.classes + 1
    times = tuple(
        dict.fromkeys(float(call["t"].flatten()[0]) for call in full)
    )  # of all steps, calibrated or not
    error, cosine, wrong, early = {}, {}, {}, {}
    for name, fields in changed.items():
        own: Any = model.with_weights(model.state_dict(), "copy")
        report = own.transform(replace(setting, **fields), calibration)
        layers = own.transforms[-1].features
        calls = grid_of(model, times, labels)
        exact = temporal_features(model, layers, calls)
        found = temporal_features(own, layers, calls)
        cosine[name] = cosines(found, exact)
        pairs = zip(by_label(found, labels), by_label(exact, labels), strict=True)
        wrong[name] = torch.stack([mistaken(a, b) for a, b in pairs])
        near_data = slice(-(len(times) // 4) * labels, None)
        early[name] = torch.stack(
            [(found[n] - exact[n])[near_data].norm(dim=1) / exact[n][near_data].norm(dim=1) for n in exact]
        ).mean(0)
        error[name] = trajectory_error(calls_of(own, range(seeds)), full)
        print(
            f"{name}: trajectory {error[name].mean():.4f}, cosine {cosine[name].mean():.6f}, "
            f"mistaken {wrong[name].float().mean():.4f}, early {early[name].mean():.4f}, {report}",
            flush=True,
        )
    write("27-tfmq-dm", [*judged(error, cosine, wrong, early), *of_size_and_speed(model, rounds), *untried()])


def judged(
    error: Mapping[str, Tensor],
    cosine: Mapping[str, Tensor],
    wrong: Mapping[str, Tensor],
    early: Mapping[str, Tensor],
) -> Iterator[Claim]:
    means = f"{SMALL}; " + ", ".join(f"{name} {v.mean():.4f}" for name, v in error.items())
    for rival, paper in (
        ("nearest", "none; the order of the method's own figures"),
        ("blocks", "FID 3.68 against 6.40 of block reconstruction (Bedrooms, W4A8)"),
        ("frozen", "the order of the method's own figures"),
    ):
        yield compared(
            f"The trajectory of a maintained time path is nearer to full precision than of {rival}",
            paper,
            error["maintained"],
            error[rival],
            means,
            (None, 0.0),
        )
    yield compared(
        "Block reconstruction has nearer trajectories where the time path is left out of it (frozen)",
        "FID 7.51 to 5.76 and 9.36 to 7.08 (Bedrooms)",
        error["frozen"],
        error["blocks"],
        means,
        (None, 0.0),
    )
    each = {name: v.flatten() for name, v in cosine.items()}
    shown = ", ".join(f"{name} {v.mean():.5f}" for name, v in each.items())
    for rival in ("blocks", "nearest"):
        yield compared(
            f"Temporal features keep their direction better than of {rival}",
            "Figure of cosines over time",
            each["maintained"],
            each[rival],
            f"cosine over 13 layers, times and classes: {shown}",
            (0.0, None),
        )
    right = 1 - wrong["maintained"].float()
    yield Claim.tried(
        "A maintained feature is nearest to that of its own time",
        paper="for 95 % of times or more",
        ours=right.mean().item(),
        interval=bootstrap(right.mean(-1).flatten()),
        claimed=(0.95, None),
        unit="of features",
        against=f"of all {STEPS} times; mistaken: "
        + ", ".join(f"{name} {v.float().mean():.4f}" for name, v in wrong.items()),
    )
    ratio = early["one range"] / early["nearest"]
    yield Claim.tried(
        "Ranges of each step halve the error of temporal features near the data, against one range",
        paper="at least 2 times",
        ours=ratio.mean().item(),
        interval=bootstrap(ratio),
        claimed=(2.0, None),
        unit="times",
        against="the same weights, nearest; the last quarter of the times",
    )


if __name__ == "__main__":
    tyro.cli(main)
