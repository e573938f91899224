"""Power-function averages of any width, after training, from a few tracked ones (EDM2, arXiv 2312.02696)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ditkit.core.checkpoint import read_metadata, read_state, write_state
from ditkit.core.errors import CheckpointError, ConfigError
from ditkit.train.ema import Average, Power, exponent


@dataclass(frozen=True)
class Snapshot:
    """A tracked power-function average after `step` steps, on disk in float16 (as EDM2 keeps them)."""

    step: int
    std: float
    path: Path

    def read(self) -> dict[str, Tensor]:
        return read_state(self.path)


def write_snapshot(folder: Path, step: int, average: Average) -> None:
    """Keep a power-function average in `folder` for `reconstruct`; averages of another kind are left out."""
    if isinstance(average.decay, Power):
        path = folder / f"{step:08d}-{average.decay.std:.3f}.safetensors"
        state = {k: v.half() if v.is_floating_point() else v for k, v in average.state.items()}
        write_state(path, state, {"step": str(step), "std": str(average.decay.std)})


def read_snapshots(folder: Path) -> list[Snapshot]:
    """Read the snapshots of a run, oldest first.

    Raises:
        CheckpointError: a file is damaged, or says neither step nor std.
    """
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        about = read_metadata(path)
        try:
            found.append(Snapshot(int(about["step"]), float(about["std"]), path))
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{path} is no snapshot: step and std are not in {about}") from error
    return sorted(found, key=lambda s: (s.step, s.std))


def correlation(step_a: Tensor, std_a: Tensor, step_b: Tensor, std_b: Tensor) -> Tensor:
    """Inner products of power-function profiles over training time (EDM2, eq. 144), broadcasting; float64."""
    gamma = np.vectorize(exponent)
    g_a, g_b = (torch.as_tensor(gamma(s.numpy()), dtype=torch.float64) for s in (std_a, std_b))
    ratio = step_a / step_b
    power = torch.where(step_a < step_b, g_b, -g_a)
    return (g_a + 1) * (g_b + 1) * ratio**power / ((g_a + g_b + 1) * torch.maximum(step_a, step_b))


def reconstruct(snapshots: Sequence[Snapshot], step: int, std: float) -> dict[str, Tensor]:
    """Weights of a power-function average that was not tracked, in float32 (EDM2, section 3.2, appendix C).

    Args:
        snapshots: of `read_snapshots`; they are read one at a time.
        step, std: of the average wanted.

    Raises:
        ConfigError: there is no snapshot, or `step` lies behind the last.
    """
    if not snapshots:
        raise ConfigError("EMA: nothing to reconstruct from, no snapshot was saved")
    latest = max(s.step for s in snapshots)
    if not 1 <= step <= latest:
        raise ConfigError(f"EMA: step={step} should lie between 1 and the last snapshot's {latest}")
    mixed: dict[str, Tensor] = {}
    for weight, snapshot in zip(coefficients(snapshots, step, std).tolist(), snapshots, strict=True):
        for name, value in snapshot.read().items():
            if not value.is_floating_point():
                mixed[name] = value
            elif name in mixed:
                mixed[name].add_(value.double(), alpha=weight)
            else:
                mixed[name] = value.double() * weight
    return {name: v.float() if v.is_floating_point() else v for name, v in mixed.items()}


def coefficients(snapshots: Sequence[Snapshot], step: int, std: float) -> Tensor:
    """Shares [n] of the snapshots, sum 1, whose profiles come nearest to the one wanted (EDM2, app. C)."""
    steps = torch.tensor([s.step for s in snapshots], dtype=torch.float64)
    stds = torch.tensor([s.std for s in snapshots], dtype=torch.float64)
    among = correlation(steps[:, None], stds[:, None], steps, stds)
    wanted = correlation(steps, stds, steps.new_tensor([step]), stds.new_tensor([std]))
    solved = torch.linalg.lstsq(among, wanted[:, None], driver="gelsd").solution[:, 0]
    return solved / solved.sum()
