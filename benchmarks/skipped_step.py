"""TaylorSeer on a processor: what forecast and recorded steps cost, and what is left of the MACs' ratio.

    python benchmarks/skipped_step.py

The emoji model's shape with random weights, the conditional and unconditional lane one after the other. Whole
trajectories are run in turns, exact and with each interval, and compared within their round: a share is the
median over the rounds of a ratio of median steps, and `at_best` the ratio of the fastest steps of all rounds.
Gates: skipped_share <= 0.06, recording_share <= 0.05, share_of_macs_ratio >= 0.8 up to interval 4, 0.7 at 6.
"""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import tyro
from rich.progress import track
from torch import Tensor

from common import record, show
from ditkit.bench.macs import count_macs
from ditkit.caching.taylorseer import TaylorSeer
from ditkit.core.cond import Cond
from ditkit.core.convention import Convention
from ditkit.core.policy import Policy
from ditkit.core.run import Call
from ditkit.core.trajectory import Trajectory
from ditkit.models.dit import DiT, DiTConfig

SHAPE = DiTConfig(
    size=32, patch=4, channels=3, width=256, depth=9, heads=4, classes=100, convention=Convention()
)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""


@dataclass(frozen=True)
class Arguments:
    """Sizes of the measurement.

    Args:
        batches: pictures a call. intervals, order: of TaylorSeer.
        steps: Euler steps of a trajectory. rounds: trajectories of each kind. threads: of torch.
        keep_heap: let the C library keep memory that it has once had, see `keep_heap`.
    """

    batches: tuple[int, ...] = (8, 16)
    intervals: tuple[int, ...] = (3, 4, 6)
    order: int = 2
    steps: int = 50
    rounds: int = 5
    threads: int = 2
    keep_heap: bool = True


def main(arguments: Arguments) -> None:
    torch.set_num_threads(arguments.threads)
    if arguments.keep_heap:
        keep_heap()
    model = random_model()
    rows = [row for batch in arguments.batches for row in measure(model, batch, arguments)]
    show(f"TaylorSeer, order {arguments.order}, {arguments.threads} threads", rows)
    record("skipped_step", rows)


def keep_heap() -> None:
    """Tell glibc to hand no freed memory back to the kernel; elsewhere nothing.

    Else chance decides in each process whether steps, exact ones too, ask for thousands of fresh pages: up to a
    fifth of their time.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)


def random_model() -> DiT:
    """Random everywhere: a fresh DiT's branches are all multiplied by zero."""
    generator = torch.Generator().manual_seed(0)
    model = DiT(SHAPE).eval()
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


@torch.no_grad()
def measure(model: DiT, batch: int, arguments: Arguments) -> list[dict[str, object]]:
    """One row an interval."""
    policies = {n: TaylorSeer(interval=n, order=arguments.order) for n in arguments.intervals}
    exact: list[list[float]] = []
    taken: dict[int, list[list[float]]] = {n: [] for n in policies}
    play(model, [], batch, min(3, arguments.steps))
    for _ in track(range(arguments.rounds), description=f"batch {batch}"):
        exact.append(play(model, [], batch, arguments.steps))
        for n, policy in policies.items():
            taken[n].append(play(model, [policy], batch, arguments.steps))
    return [row(model, batch, policy, exact, taken[n]) for n, policy in policies.items()]


def play(model: DiT, policies: Sequence[Policy], batch: int, steps: int) -> list[float]:
    """Seconds of each step of one trajectory, both lanes together."""
    trajectory = Trajectory(model.sites(), policies, steps)
    x = torch.randn(batch, *model.sample_shape, generator=torch.Generator().manual_seed(0))
    seconds = []
    for index in range(steps):
        start = time.perf_counter()
        v = [evaluate(model, trajectory, x, index, lane) for lane in ("cond", "uncond")]
        x = x - (v[1] + 2 * (v[0] - v[1])) / steps
        seconds.append(time.perf_counter() - start)
    return seconds


def evaluate(model: DiT, trajectory: Trajectory, x: Tensor, index: int, lane: str) -> Tensor:
    total = trajectory.total
    call = Call(index, total, 1 - index / total, lane, layout=model.layout(model.sample_shape))
    cond = Cond(label=torch.arange(len(x)) % SHAPE.classes)
    cond = model.unconditional(cond) if lane == "uncond" else cond
    return trajectory.leave(call, model(x, torch.full((len(x),), call.t), cond, run=trajectory.run(call)))


def row(
    model: DiT, batch: int, policy: TaylorSeer, exact: list[list[float]], taken: list[list[float]]
) -> dict[str, object]:
    steps = len(exact[0])
    full = policy.full_steps(steps)
    settled = full[policy.order + 1 :]  # those that record as many factors as they find
    skipped = sorted(set(range(steps)) - set(full))
    dense_s = [median(run) for run in exact]
    full_s = [median(run[i] for i in settled) for run in taken]
    skipped_s = [median(run[i] for i in skipped) for run in taken]
    least_s = min(map(min, exact))
    macs_ratio = steps / (len(full) + len(skipped) * skipped_macs(model, batch, policy))
    speedup = ratio(map(sum, exact), map(sum, taken))
    return {
        "batch": batch,
        "interval": policy.interval,
        "dense_ms": 1e3 * median(dense_s),
        "full_ms": 1e3 * median(full_s),
        "skipped_ms": 1e3 * median(skipped_s),
        "recording_share": ratio(full_s, dense_s) - 1,
        "recording_share_at_best": min(run[i] for run in taken for i in settled) / least_s - 1,
        "skipped_share": ratio(skipped_s, dense_s),
        "skipped_share_at_best": min(run[i] for run in taken for i in skipped) / least_s,
        "macs_ratio": macs_ratio,
        "speedup": speedup,
        "share_of_macs_ratio": speedup / macs_ratio,
    }


def ratio(over: Iterable[float], under: Iterable[float]) -> float:
    """The median ratio of what belongs to the same round."""
    return median(a / b for a, b in zip(over, under, strict=True))


def skipped_macs(model: DiT, batch: int, policy: TaylorSeer) -> float:
    """MACs of a forecast evaluation, as a share of a full one."""
    steps = policy.warmup + 1
    trajectory = Trajectory(model.sites(), [policy], steps)
    x = torch.zeros(batch, *model.sample_shape)
    macs = [count_macs(evaluate, model, trajectory, x, index, "cond").total for index in range(steps)]
    return macs[-1] / macs[0]


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
