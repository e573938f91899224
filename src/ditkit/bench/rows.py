"""One line of a comparison, and the short names of policies that are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple

from ditkit.core.errors import ConfigError
from ditkit.core.policy import Policy
from ditkit.metrics.distribution import Distribution
from ditkit.metrics.error import ClipErrors

Kind = Literal["exact", "policy", "rival", "control"]
MEASURED = ("policy", "rival")
"""Kinds of rows that are held against the exact run of the first model: its policies, and other models."""

DISTANCES = {
    "fid": "fid",
    "kid": "kid_mean",
    "kid_std": "kid_std",
    "mifid": "mifid",
    "precision": "precision",
    "recall": "recall",
    "n": "n_fake",
    "n_real": "n_real",
    "extractor": "extractor",
    "features": "features",
    "fid_features": "fid_features",
}
"""Keys of a row that was compared with real samples, and the fields of `Distribution` they hold."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method with its cost and its error; `DEFINITIONS` says what each number is.

    A PSNR is None where the two sets of samples are identical, and what was not measured is None. A plot
    joins the rows of one `series` by a line and tells them apart by their `tag`.
    """

    name: str
    kind: Kind
    series: str
    tag: str
    policy: str
    steps: int
    evaluations: int
    full_evaluations: int
    seconds: float
    seconds_each: tuple[float, ...]
    speedup: float
    macs: int
    macs_ratio: float
    macs_uncounted: tuple[str, ...]
    peak_bytes: int | None
    peak_added_bytes: int | None
    policy_bytes: int
    identical: bool
    psnr_db: float | None
    psnr_worst_db: float | None
    ssim: float | None
    relative_l2: float | None
    psnr_converged_db: float | None
    control_steps: int | None
    control_macs_ratio: float | None
    control_identical: bool | None
    control_psnr_db: float | None
    control_psnr_converged_db: float | None
    receipt: tuple[dict[str, Any], ...]
    parameters: int | None = None
    weight_bytes: int | None = None
    clip: ClipErrors | None = None
    distribution: Distribution | None = None

    @property
    def temporal_psnr_db(self) -> float | None:
        """None of pictures, too."""
        return None if self.clip is None else self.clip.temporal_psnr_db

    def as_dict(self) -> dict[str, Any]:
        """JSON-able and flat.

        The distances between distributions are there only where they were measured, the errors of clips only
        for clips.
        """
        values = asdict(self)
        for key in (
            "parameters",
            "weight_bytes",
        ):  # of a pipeline's rows, which have no other model beside them
            if values[key] is None:
                del values[key]
        distances = values.pop("distribution")
        values |= values.pop("clip") or {}
        if distances is not None:
            values |= {key: distances[name] for key, name in DISTANCES.items()}
        return values


DEFINITIONS = {
    "steps": "steps of the solver",
    "evaluations": "evaluations of the guided model in a trajectory",
    "full_evaluations": "those in which every site that a policy owns was computed",
    "seconds": "wall clock for all samples: median of the rounds, in which the rows took turns",
    "speedup": "seconds of the exact row over seconds of this one",
    "macs": "multiply-accumulates that really ran, for all samples",
    "macs_ratio": "macs over those of the exact row",
    "macs_uncounted": "operations that may multiply matrices and have no formula",
    "peak_bytes": "highest memory of a process of its own that draws the first batch (resident on a CPU, "
    "with the interpreter and its libraries; allocated on a GPU)",
    "peak_added_bytes": "peak_bytes less what the process held before it drew",
    "parameters": "numbers of the network of this row, frozen ones and those of transforms included",
    "weight_bytes": "memory of its weights and buffers, as they are stored",
    "policy_bytes": "the most that the policies held at once in a batch",
    "identical": "whether every sample equals the exact run's to the bit; its PSNR, infinite, is then null",
    "psnr_db": "to the exact run of the same seeds and steps, of the squared error averaged over all "
    "samples; data range 2, not clipped; of clips given in part, over what was generated of them, as are all errors",
    "psnr_worst_db": "the same, of the sample that is farthest off",
    "ssim": "to the exact run of the same seeds and steps, mean over samples, and over the frames of clips of "
    "which something was generated; null below 6 pixels a side",
    "relative_l2": "norm of the difference to the exact run over the norm of that run, mean over samples",
    "temporal_psnr_db": "as psnr_db, of the differences between neighbouring frames, averaged over all of them "
    "and all samples: a constant shift costs nothing, flicker does; a pixel counts that was generated in either of "
    "the two frames; null for clips of one frame",
    "psnr_by_frame_db": "as psnr_db, of each frame on its own; null where it was given or equals the exact run's",
    "psnr_converged_db": "as psnr_db, to the exact sampler with many steps (settings.converged_steps)",
    "control_steps": "how many steps of the exact sampler cost nearest to the MACs of this row",
    "control_macs_ratio": "what those exact steps cost, over the MACs of the exact row",
    "control_psnr_db": "psnr_db of those exact steps",
    "control_psnr_converged_db": "psnr_converged_db of those exact steps",
    "receipt": "which evaluations each policy computed and which it replaced, by guidance lane",
    "fid": "Frechet distance to the real set over fid_features; null below 5 pictures a feature",
    "kid": "kernel distance to the real set over features, mean of random subsets",
    "kid_std": "its standard deviation over the subsets",
    "mifid": "memorisation-informed Frechet distance over features",
    "precision": "share of samples inside the real set's manifold",
    "recall": "share of the real set inside the samples' manifold",
}
"""The meaning of each key of a row; every report carries it."""


class Title(NamedTuple):
    """The name of a policy among others."""

    name: str
    series: str
    tag: str


def titles(policies: Sequence[Policy]) -> list[Title]:
    """Name policies by class, with the fields in which they differ from each other or from their defaults.

    Raises:
        ConfigError: a policy is given twice.
    """
    for place, policy in enumerate(policies):
        if policy in policies[:place]:
            raise ConfigError(f"policy {policy} is given twice; expected different ones")
    return [_title(policy, [p for p in policies if type(p) is type(policy)]) for policy in policies]


def _title(policy: Policy, alike: Sequence[Policy]) -> Title:
    kind = type(policy).__name__
    own = {f.name: getattr(policy, f.name) for f in fields(policy)}  # type: ignore[arg-type]
    defaults = {f.name: f.default for f in fields(policy)}  # type: ignore[arg-type]
    varying = [name for name, value in own.items() if any(getattr(p, name) != value for p in alike)]
    odd = [name for name, value in own.items() if value != defaults[name]]
    shown = {name: f"{name}={own[name]}" for name in own if name in varying or name in odd}
    tag = shown[varying[0]] if varying else ""
    rest = [text for text in shown.values() if text != tag]
    return Title(" ".join([kind, *shown.values()]), " ".join([kind, *rest]), tag or kind)


CLOSE_DB = 30.0
"""From about here on, small pictures are hard to tell apart; the headline looks for speed above it."""
NOTHING = "\N{EN DASH}"


def decibels(value: float | None, identical: bool | None = False) -> str:
    """31.24 as '31.2', and 'identical' where there is no error."""
    return "identical" if identical else NOTHING if value is None else f"{value:.1f}"


def megabytes(value: int | None) -> str:
    return NOTHING if value is None else f"{value / 1e6:,.1f}" if value < 1e7 else f"{value / 1e6:,.0f}"


def to_exact(row: Row, value: float | None) -> str:
    """Format a PSNR to the exact run, which is not compared with itself."""
    return NOTHING if row.kind == "exact" else decibels(value, row.identical)


def distance(row: Row) -> str:
    """Format the PSNR to the exact run with its unit."""
    if row.kind == "exact":
        return "the reference"
    return "identical to exact" if row.identical else f"{decibels(row.psnr_db)} dB to exact"


def caption(row: Row) -> list[str]:
    """Three lines beside a row of pictures."""
    return [row.name, f"{row.seconds:.2f} s, {row.speedup:.2f}x", distance(row)]


def converged_caption(steps: int) -> list[str]:
    return ["converged", f"exact, {steps} steps", "what fewer steps approach"]


def headline(rows: Sequence[Row], noun: str) -> str:
    """Summarise the fastest policy, or rival, that is close to the exact run, or the closest, and its control."""
    exact = rows[0]
    policies = [row for row in rows if row.kind in MEASURED]
    if not policies:
        return f"The exact sampler alone: {exact.seconds:.2f} s."
    close = [row for row in policies if row.identical or (row.psnr_db or 0) >= CLOSE_DB]
    closest = max(policies, key=lambda row: row.psnr_db or 0)
    best = max(close, key=lambda row: row.speedup, default=closest)
    drawn = f"{noun}s"
    near = f"identical {drawn}" if best.identical else f"{decibels(best.psnr_db)} dB PSNR to its {drawn}"
    faster = f"{best.name} is {best.speedup:.2f} times as fast as the exact sampler, at {near}"
    if not close:
        word = "row" if any(row.kind == "rival" for row in policies) else "policy"
        faster = f"No {word} keeps a PSNR of {CLOSE_DB:g} dB to the exact sampler. The closest: {faster}"
    return f"{faster}{_against_control(best)}."


def _against_control(row: Row) -> str:
    if row.control_steps is None or row.identical:
        return ""
    steps = f"{row.control_steps} exact step{'s'[: row.control_steps > 1]}"
    if row.control_psnr_db is None or row.psnr_db is None:
        return f"; {steps} would cost as much and be identical"
    if row.control_psnr_db < row.psnr_db:
        return f"; the same MACs spent on {steps} reach only {decibels(row.control_psnr_db)} dB"
    return f"; the same MACs spent on {steps} would be closer, {decibels(row.control_psnr_db)} dB"
