"""A pruned, quantised network under forecasts: each factor's core time and error, all together, and fewer steps beside.

    python benchmarks/quantised_compositions.py

Writes results/quantised_compositions.json and results/quantised_orders.json. Errors are the mean over samples of
|x - x*| / |x*|, to the float32 network of all steps and the same seeds ("to full"), and to the same network without
the cache ("to own").

The second table is of a fault reported elsewhere: a forecast from differences multiplies the rounding of quantised
activations, since the weights of its kept outputs sum to 1 and their squares to more. `farther` is the share of
computed evaluations whose branches the forecast would have missed by more than reuse, in squared error.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

import ditkit
from common import record, show
from ditkit.caching import TaylorSeer
from ditkit.compress import TemporalMaintenance
from ditkit.compress.scores import block_influence, least_needed
from ditkit.core.cond import Cond
from ditkit.core.model import Model
from ditkit.core.policy import Policy
from ditkit.core.run import Run
from ditkit.sample.denoiser import Estimate
from ditkit.sample.noise import SampleNoise
from ditkit.sample.solvers import Ddim

MODEL = "fashion-dit"


def draw(model: Model, steps: int, seeds: int, policies: Sequence[Policy] = ()) -> tuple[Tensor, float]:
    """Samples and the core seconds of drawing them."""
    began = time.process_time()
    drawn = ditkit.generate(
        model, seeds=range(seeds), steps=steps, guidance=1.0, batch_size=seeds, policies=policies
    )
    return drawn.samples, time.process_time() - began


def apart(own: Tensor, other: Tensor) -> float:
    """Mean over samples of |own - other| / |other|."""
    return ((own - other).flatten(1).norm(dim=1) / other.flatten(1).norm(dim=1)).mean().item()


def pruned(model: Model, blocks: int) -> Model:
    """The model without the blocks of highest influence score, which change their inputs least."""
    torch.manual_seed(0)
    x, t = torch.randn(32, *model.sample_shape), torch.full((32,), 250.0)
    scores = block_influence(model, x, t, Cond(label=torch.arange(32) % 10))
    return ditkit.compress(model, least_needed(scores, blocks))


def farther(model: Model, steps: int, seeds: int, policy: TaylorSeer) -> float:
    """The share of evaluations, computed every `interval`, whose branches a forecast misses by more than reuse does."""
    names = [site.name for site in model.sites() if site.kind == "branch"]
    history: list[dict[str, Tensor]] = []

    def note(found: dict[str, Tensor], name: str, fn: Any, *args: Any) -> Tensor:
        found[name] = fn(*args)
        return found[name]

    path = model.config.convention.make_path()
    times = path.times(steps)
    x, cond = noise_of(model, seeds), Cond(label=torch.arange(seeds) % 10)
    stepper = Ddim().begin(path, times)
    with torch.no_grad():
        while (t := stepper.t) is not None:
            found: dict[str, Tensor] = {}
            run = Run({name: partial(note, found, name) for name in names})
            given = torch.full((seeds,), t)
            value, _ = model.config.convention.split(model(x.float(), given, cond, run=run))
            estimate = Estimate(
                path, model.config.convention.prediction, value.double(), x, x.new_tensor([t])
            )
            x = stepper.step(x, estimate)
            history.append(found)
    kept = list(range(0, steps, policy.interval))
    worse = []
    for place in range(policy.order + 1, len(kept)):
        anchors = [kept[place - 1 - i] for i in range(policy.order + 1)]
        weights = policy.predict(kept[place], anchors)
        errors = torch.zeros(2)
        for name in names:
            outs = [history[anchor][name] for anchor in anchors]
            forecast = sum(w * out for w, out in zip(weights, outs, strict=True))
            errors += torch.tensor(
                [(one - history[kept[place]][name]).square().sum() for one in (forecast, outs[0])]
            )
        worse.append(float(errors[0] > errors[1]))
    return sum(worse) / len(worse)


def noise_of(model: Model, seeds: int) -> Tensor:
    return SampleNoise(tuple(range(seeds)), model.sample_shape).draw().double()


def main(
    steps: int = 50,
    seeds: int = 4,
    interval: int = 4,
    dropped: int = 2,
    long: int = 150,
    tables: tuple[Literal["compositions", "orders"], ...] = ("compositions", "orders"),
) -> None:
    """Measure both tables.

    Args:
        steps: of DDIM. seeds: samples. interval: of the cache. dropped: blocks that pruning takes out.
        tables: to make. long: steps of the second table's finer schedule, on which features move less.
    """
    torch.set_num_threads(1)
    full: Any = ditkit.load(MODEL)
    setting = TemporalMaintenance(rounding="nearest", samples=16, interval=10, steps=steps)
    small = ditkit.compress(full, setting)
    if "compositions" in tables:
        seven = TemporalMaintenance(rounding="nearest", samples=16, interval=10, steps=steps, activations=7)
        networks: dict[str, Any] = {
            "float32": full,
            f"{dropped} blocks fewer": (shallow := pruned(full, dropped)),
            "W8A8": small,
            "W8A7": ditkit.compress(full, seven),
            f"{dropped} blocks fewer, W8A8": ditkit.compress(shallow, setting),
        }
        rows = compositions(full, networks, steps, seeds, TaylorSeer(interval=interval))
        show(f"{steps} steps, {seeds} samples", rows)
        record("quantised_compositions", rows)
    if "orders" in tables:
        rows = orders({"float32": full, "W8A8": small}, ((steps, interval), (long, 2)), seeds)
        show("orders", rows)
        record("quantised_orders", rows)


def compositions(
    full: Model, networks: Mapping[str, Any], steps: int, seeds: int, cache: TaylorSeer
) -> list[dict[str, Any]]:
    """Each network without the cache and with it, and as many exact steps of the full one as take the same time."""
    exact, base = draw(full, steps, seeds)
    rows = []
    for name, network in networks.items():
        own, seconds = draw(network, steps, seeds)
        fast, cached = draw(network, steps, seeds, [cache])
        for label, samples, spent in ((name, own, seconds), (f"{name}, TaylorSeer", fast, cached)):
            fewer = max(1, round(steps * min(1.0, spent / base)))
            rows.append(
                {
                    "network": label,
                    "core_seconds": spent,
                    "times_faster": base / spent,
                    "error_to_full": apart(samples, exact),
                    "error_to_own": apart(samples, own),
                    "fewer_steps": fewer,
                    "error_of_fewer_steps": apart(draw(full, fewer, seeds)[0], exact),
                }
            )
    return rows


def orders(
    networks: Mapping[str, Any], schedules: Sequence[tuple[int, int]], seeds: int
) -> list[dict[str, Any]]:
    """Each order on each network and schedule."""
    rows = []
    for name, network in networks.items():
        for steps, interval in schedules:
            own, _ = draw(network, steps, seeds)
            for order in (0, 1, 2):
                policy = TaylorSeer(interval=interval, order=order)
                samples, _ = draw(network, steps, seeds, [policy])
                rows.append(
                    {
                        "network": name,
                        "steps": steps,
                        "interval": interval,
                        "order": order,
                        "error_to_own": apart(samples, own),
                        "farther_than_reuse": farther(network, steps, 1, policy) if order else 0.0,
                    }
                )
    return rows


if __name__ == "__main__":
    tyro.cli(main)
