"""A method that acts on a model's sites, and the state it keeps for one trajectory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ditkit.core.config import Checked
from ditkit.core.grid import Grid
from ditkit.core.run import Call, Handler, Site

Claim = Literal["own", "wrap", "see"]
Key = tuple[str, ...]
"""(net, lane), and where a policy keeps more than one thing a lane, its site or name."""
RESOURCES = ("schedule", "rows", "solver")
"""The resources beside sites that can be owned: the steps computed, the tokens that exist, the solver's update."""


class Session:
    """All state of one policy in one scope, shared by its guidance lanes; keys start with (net, lane)."""

    verb: ClassVar[str] = "replaced"
    """The receipt's word for a site whose function did not run: forecast, reused, skipped ..."""

    def __init__(self) -> None:
        self.state: dict[Key, Any] = {}
        self.staged: dict[Key, Any] = {}
        self.remarks: dict[str, str | float] = {}
        """Remarks for the receipt, beside what was replaced."""
        self.computed: set[str] = set()
        """Sites that did all their work in this call although their function did not run."""

    def enter(self, call: Call) -> Mapping[str, Handler]:
        """Handlers for this call by site name; an empty mapping is exact. Changes no committed state."""
        return {}

    def rows(self, call: Call) -> Mapping[str, Tensor]:
        """For each attention whose output has its rows elsewhere in this call, where the model's are: int64 [rows]."""
        return {}

    def leave(self, call: Call, out: Any) -> Any:
        """Return the model's output, possibly replaced."""
        return out

    def guided(self, call: Call, v: Tensor) -> Tensor:
        """Once an evaluation, after guidance and before the solver; `v` has the sample's shape."""
        return v

    def put(self, key: Key, value: Any) -> None:
        """Stage a value until the call is complete: an interrupted call must not leave state of two ages."""
        self.staged[key] = value

    def commit(self) -> None:
        """Turn staged values into state, once the call is complete."""
        self.state.update(self.staged)
        self.staged.clear()

    def bytes(self) -> int:
        """Memory of every tensor kept."""
        return sum(t.numel() * t.element_size() for t in tree_leaves(self.state) if isinstance(t, Tensor))

    def projected_bytes(self) -> int:
        """Return what `bytes` will grow to over the trajectory, as far as it can be known now."""
        return self.bytes()

    def foreseen_bytes(self, call: Call, tokens: Any) -> int:
        """`projected_bytes` as it will be after `call`, as far as its embedded tokens say: before its first block."""
        return self.projected_bytes()

    def fitting(self, need: int, allowed: int) -> str:
        """Name a setting that would hold at most `allowed` bytes, this one needing `need`; empty if none is known."""
        return ""


class Policy(Checked, ABC):
    """A frozen dataclass that is its own configuration; it holds no state."""

    homes: ClassVar[tuple[str, ...]] = (
        "ditkit.caching",
        "ditkit.attention",
        "ditkit.adapt",
        "ditkit.compress",
    )
    inherent: ClassVar[bool] = False
    """True if a model that was trained under it cannot do without: see `with_inherent`."""

    @abstractmethod
    def claims(self, sites: Sequence[Site]) -> Mapping[str, Claim]:
        """Sites (or `RESOURCES`) that this policy owns, wraps or sees."""

    @abstractmethod
    def start(self, sites: Sequence[Site], total: int, modules: nn.Module | None = None) -> Session:
        """Fresh state for one trajectory of `total` evaluations a lane.

        Raises:
            ConfigError: the setting does not fit `total`.
        """

    @abstractmethod
    def exact(self) -> Self:
        """Return the neutral setting: bit-identical to not using the policy."""

    def whole(self) -> Policy:
        """Return the setting that leaves nothing out, with what it trains of the weights; of most, itself."""
        return self

    def check_model(self, model: Any) -> None:
        """Refuse weights that the policy was not made for; sites alone do not tell them apart.

        That of an inherent policy reads the config and the sites only, as `Model.adopt` calls it while it loads.

        Raises:
            ConfigError: it was made for others.
        """

    def full_steps(self, total: int) -> Sequence[int]:
        """List the evaluations of `total` that are computed, counted from the first; empty unless the setting says."""
        return ()

    def check_schedule(self, times: Sequence[float], sampler: str) -> None:
        """Refuse steps that the policy was not made for, before the first one.

        Args:
            times: noise-times of the steps, from noise to data. sampler: the solver, or the scheduler's class.

        Raises:
            ConfigError: it was made for others.
        """

    def modules(self, sites: Sequence[Site]) -> nn.ModuleDict | None:
        """Parameters that the policy trains, saved beside the model: by `site_key`, those of no site under "all"."""
        return None

    def upgraded(self, state: Mapping[str, Tensor], sites: Sequence[Site]) -> Mapping[str, Tensor]:
        """Tensors of a model, those that an older version of the policy saved under today's names."""
        return state

    @classmethod
    def small(cls, grid: Grid) -> Self:
        """Return a setting that acts on a test model with tokens of `grid` in a dozen evaluations."""
        return cls()


def site_key(name: str) -> str:
    """Return a site's name as a key of a ModuleDict, which takes no dots."""
    return name.replace(".", "/")


def with_inherent(model: Any, policies: Sequence[Policy]) -> tuple[Policy, ...]:
    """`policies`, after those inherent ones of the model whose class they do not name.

    Whoever wants a model without one names its `exact()`.
    """
    given = {type(policy) for policy in policies}
    own = (p for p in getattr(model, "policies", ()) if p.inherent and type(p) not in given)
    return (*own, *policies)


def detached(value: Any) -> Any:
    """Cut a tree of tensors from autograd, as caches keep them."""
    return tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, value)
