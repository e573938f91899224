"""Growth of a forward pass with the picture: multiplications and seconds of six backbones, 16 to 128 pixels a side.

    python benchmarks/how_cost_grows.py

Each network is built with the same width and with tokens of 2 x 2 pixels, but for those whose convolutions read pixels:
DiCo, and the second resolution of DiMR. Widths rise in the lower stages of DiCo and LaMamba, as in their papers. One
sample in float32 on one thread; all networks take turns at a size. Writes benchmarks/results/how_cost_grows.json and
docs/results/how_cost_grows.png.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from common import Row, record, show
from ditkit.attention.linear import ReluLinear
from ditkit.bench.macs import count_macs
from ditkit.bench.scaling import slope
from ditkit.bench.timing import alternated, medians
from ditkit.core.cond import Cond
from ditkit.core.model import Denoiser, parameter_count
from ditkit.core.run import Call
from ditkit.core.trajectory import Trajectory
from ditkit.models.dico import DiCo, DiCoConfig
from ditkit.models.dimr import DiMR, DiMRConfig
from ditkit.models.dit import DiT, DiTConfig
from ditkit.models.lamamba import LaMamba, LaMambaConfig
from ditkit.models.pt_dit import PTDiT, PTDiTConfig
from ditkit.report.theme import LIGHT

SIDES = (16, 32, 64, 128)
PICTURE = Path(__file__).parents[1] / "docs" / "results" / "how_cost_grows.png"
MARKERS = "oPsD^v"
LINES = ("-", "--", ":", "-.", (0, (4, 2)), (0, (12, 4)))


@dataclass(frozen=True)
class Arguments:
    """Sizes of the measurement.

    Args:
        width: of each network. depth: number of blocks, of DiCo and LaMamba one a level. rounds: alternated runs.
    """

    width: int = 48
    depth: int = 4
    rounds: int = 5


def networks(arguments: Arguments, side: int) -> Mapping[str, Denoiser]:
    """Build each network for pictures of a size."""
    width, depth, data = arguments.width, arguments.depth, {"size": side, "channels": 1, "classes": 10}
    plain: dict[str, Any] = {"patch": 2, "width": width, "depth": depth, "heads": 4, **data}
    stages: dict[str, Any] = {"depth": (1, 1, 1, 1), "deeper": False, "middle": 1, "window": 4}
    torch.manual_seed(0)
    return {
        "DiT": DiT(DiTConfig(**plain)),
        "LiT": DiT(DiTConfig(**plain)).adopt([ReluLinear(heads=2)]),
        "PT-DiT": PTDiT(PTDiTConfig(**plain)),
        "DiCo": DiCo(DiCoConfig(width=width, depth=(1,) * 5, **data)),
        "DiMR": DiMR(
            DiMRConfig(width=(width, width // 2), depth=(depth // 2,) * 2, patch=(2, 1), heads=4, **data)
        ),
        "LaMamba": LaMamba(LaMambaConfig(**{**plain, **stages})),
    }


def forward(model: Denoiser, device: str, side: int) -> Callable[[], Any]:
    """Return a forward pass of one sample, under the policies that the network was built with."""
    model = model.to(device).eval()
    x = torch.zeros(1, 1, side, side, device=device)
    t, cond = (
        torch.full((1,), 500.0, device=device),
        Cond(label=torch.zeros(1, dtype=torch.long, device=device)),
    )
    trajectory = Trajectory(model.sites(), model.policies, 1, learned=model.learned)
    call = Call(0, 1, 0.5, layout=model.layout(tuple(x.shape[1:])))

    def once() -> Any:
        return model(x, t, cond, trajectory.run(call))

    return once


@torch.no_grad()
def main(arguments: Arguments) -> None:
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {}
    macs: dict[str, list[int]] = {}
    parameters: dict[str, int] = {}
    for side in SIDES:
        models = networks(arguments, side)
        timed = medians(
            alternated({name: forward(m, "cpu", side) for name, m in models.items()}, arguments.rounds)
        )
        for name, model in models.items():
            seconds.setdefault(name, []).append(timed[name])
            parameters[name] = parameter_count(model)
            macs.setdefault(name, []).append(count_macs(forward(model, "meta", side)).total)
    rows = [
        {
            "network": name,
            "parameters": parameters[name],
            **{f"mmac_{side}": count / 1e6 for side, count in zip(SIDES, macs[name], strict=True)},
            **{f"ms_{side}": 1e3 * one for side, one in zip(SIDES, seconds[name], strict=True)},
            "macs_grow": slope([side * side for side in SIDES], macs[name]),
            "macs_grow_last": slope([side * side for side in SIDES[-2:]], macs[name][-2:]),
            "time_grows_last": slope([side * side for side in SIDES[-2:]], seconds[name][-2:]),
        }
        for name in macs
    ]
    show("one forward pass; growth is the exponent of the number of pixels", rows)
    record("how_cost_grows", rows)
    draw(rows)


def draw(rows: list[Row]) -> None:
    """Draw multiplications and seconds over the side, both on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axes, key, label in zip(
        figure.subplots(1, 2), ("mmac", "ms"), ("million MACs", "milliseconds"), strict=True
    ):
        for i, row in enumerate(rows):
            amounts = [row[f"{key}_{side}"] for side in SIDES]
            look = {"marker": MARKERS[i], "linestyle": LINES[i], "color": LIGHT[f"c{i}"]}
            axes.loglog(SIDES, amounts, label=row["network"], **look)
        axes.set_xticks(SIDES, [str(side) for side in SIDES])
        axes.minorticks_off()
        axes.set_xlabel("pixels a side")
        axes.set_title(f"{label} of a forward pass", loc="left")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
