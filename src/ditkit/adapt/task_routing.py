"""Denoising task routing (DTR, arXiv 2310.07138): blocks work on a window of channels that follows the noise level."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Gt, Interval
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ditkit.core.config import Natural
from ditkit.core.convention import PathName
from ditkit.core.errors import CheckpointError, ConfigError, ConflictError
from ditkit.core.policy import Claim, Policy, Session
from ditkit.core.run import Call, Handler, Site, named
from ditkit.nn.task_windows import active, tasks_of, windows

Routes = Literal["windows", "random"]
TABLE = ".routing._unit_mapping"
"""The end of the names under which published weights hold each block's masks, [1000, D]."""


@dataclass(frozen=True)
class TaskRouting(Policy):
    """A block is given the active channels of its sample's task; the others bypass it: block(m x) + (1 - m) x.

    Tasks are DDPM's 1000 indices; of a continuous path, the index whose ratio of signal to noise is nearest. Norms
    run over all channels, zeros included, and a block may write to all. It costs no parameters, and a model trained so
    cannot do without.

    Args:
        share: of the channels that is active (the paper's beta).
        alpha: of the windows' places, slack (index / 999)^alpha: the higher, the later they move.
        routes: sliding windows, or the control: for each task and block as many channels at random.
        path: of the model's convention.
        seed: of random routes.
    """

    inherent: ClassVar[bool] = True
    share: Annotated[float, Interval(gt=0, le=1)] = 0.8
    alpha: Annotated[float, Gt(0)] = 4.0
    routes: Routes = "windows"
    path: PathName = "ddpm"
    seed: Natural = 0

    def claims(self, sites: Sequence[Site]) -> Mapping[str, Claim]:
        return dict.fromkeys(named(sites, "block"), "wrap")

    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> Session:
        return Routed(self, named(sites, "block"))

    def exact(self) -> TaskRouting:
        return replace(self, share=1.0)

    def check_model(self, model: Any) -> None:
        """Refuse a model of another path, whose noise-times are other tasks, or that routes its blocks itself.

        A transformer of diffusers does not name its path, and is taken with that of the policy.

        Raises:
            ConfigError, ConflictError: it is one.
        """
        if self == self.exact():
            return
        convention = getattr(model.config, "convention", None)
        if convention is not None and convention.path != self.path:
            raise ConfigError(
                f"TaskRouting: got path={self.path!r}, and the model is of path {convention.path!r}, whose noise-times "
                f"are other tasks; expected taskrouting:path={convention.path}"
            )
        if named(model.sites(), "route"):
            kind = type(model).__name__
            raise ConflictError(
                f"TaskRouting and {kind} both decide by time what a block is given; use one of them"
            )

    def upgraded(self, state: Mapping[str, Tensor], sites: Sequence[Site]) -> Mapping[str, Tensor]:
        """Return the tensors without the tables of masks that published weights hold.

        Raises:
            CheckpointError: a table is not that of this setting.
        """
        for name, table in state.items():
            if not name.endswith(TABLE):
                continue
            mask = self.mask(torch.arange(len(table)), table.shape[-1], name.removesuffix(TABLE))
            if not torch.equal(table.bool(), mask):
                given = f"{int(table[0].sum())} of {table.shape[-1]} channels active at task 0"
                raise CheckpointError(
                    f"{name!r} are other masks than those of {self}: {given}; expected the setting that the weights "
                    "were trained under"
                )
        return {name: value for name, value in state.items() if not name.endswith(TABLE)}

    def tasks(self, times: Tensor) -> Tensor:
        """Return the tasks, int64, of noise-times [B].

        Raises:
            ConfigError: frames have times of their own.
        """
        if times.ndim != 1:
            raise ConfigError(f"TaskRouting: times {list(times.shape)}, expected one a sample, [B]")
        return tasks_of(self.path, times)

    def mask(self, task: Tensor, channels: int, name: str) -> Tensor:
        """Whether a channel is active, bool [B, channels], in the block `name`."""
        if self.routes == "windows":
            return windows(task, channels, self.share, self.alpha)
        rows = {t: _random(t, channels, self.share, name, self.seed) for t in set(task.tolist())}
        return torch.stack([rows[t] for t in task.tolist()]).to(task.device)


class Routed(Session):
    """The tasks of each call."""

    verb: ClassVar[str] = "routed"

    def __init__(self, policy: TaskRouting, blocks: Sequence[str]) -> None:
        super().__init__()
        self.policy, self.blocks = policy, blocks

    def enter(self, call: Call) -> Mapping[str, Handler]:
        if self.policy.share == 1:
            return {}
        task = self.policy.tasks(call.times)
        if self.policy.routes == "windows":
            return dict.fromkeys(
                self.blocks, partial(routed, cache(partial(self.policy.mask, task, name="")))
            )
        return {name: partial(routed, partial(self.policy.mask, task, name=name)) for name in self.blocks}


def routed(mask: Any, fn: Handler, x: Any, *args: Any) -> Any:
    """fn(m x) + (1 - m) x; each of two streams has the window of its own width.

    Args:
        mask: gives m [B, D] of a width D.
    """

    def kept(h: Tensor) -> Tensor:
        m: Tensor = mask(channels=h.shape[-1])
        return m.view(len(m), *[1] * (h.ndim - 2), -1)

    masks = tree_map(kept, x)
    out = fn(tree_map(lambda h, m: h * m, x, masks), *args)
    return tree_map(lambda new, h, m: new + h * ~m, out, x, masks)


def _random(task: int, channels: int, share: float, name: str, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(zlib.crc32(f"{seed} {task} {name}".encode()))
    chosen = torch.zeros(channels, dtype=torch.bool)
    chosen[torch.randperm(channels, generator=g, device="cpu")[: active(channels, share)]] = True
    return chosen
