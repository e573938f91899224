"""Temporal feature maintenance (TFMQ-DM, arXiv 2311.16503): the time path of a network is quantised by itself.

Temporal features depend on the time and on no sample. Rounded together with the block that reads them, they are bent
to that block's data, and the network takes one step for another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ditkit.compress.quantised import Fitting, Quantised
from ditkit.core.transform import Transform


@dataclass(frozen=True)
class TemporalMaintenance(Quantised):
    """Quantise linear layers, those of the time path before all others and by their own loss.

    W8A8 is `weights=8`, W4A8 `weights=4`, W4A32 `weights=4, activations=32`.

    Args:
        time: "maintained" learns the time path from its features alone (TIAR) and leaves it so; "frozen" rounds it to
            the nearest and leaves it so; "blocks" learns each of its layers with the block that it stands in, as if
            there were no time path (BRECQ).
        weights, activations, rounding, ranges and the others: as of `Quantised`.
    """

    time: Literal["maintained", "frozen", "blocks"] = "maintained"

    def round_time_path(self, fitting: Fitting) -> None:
        if self.time == "maintained":
            fitting.learn_features()
        elif self.time == "frozen":
            for layer in fitting.time_path.values():
                layer.mode = "nearest"

    @classmethod
    def small(cls, model: Any) -> tuple[Transform, ...]:
        inside = tuple(stack.path + "." for stack in model.stacks().values())
        found = tuple(n for n, m in model.named_modules() if type(m) is nn.Linear and n.startswith(inside))
        return (cls(rounding="nearest", ranges="rows", layers=found),)
