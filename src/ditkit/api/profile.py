"""A profile of a call of a model of ours or a pipeline of diffusers, exact or accelerated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from ditkit.bench.origin import origin
from ditkit.bench.profile import DENOISER, Account, Key, account, device_of, settled_parts
from ditkit.bench.roofline import measure_roofs
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.core.model import Denoiser
from ditkit.core.run import Site
from ditkit.report.profile import Entry, Profile, SiteCost
from ditkit.sample.sampler import Sampler, Sampling

Denoisers = list[tuple[nn.Module, Sequence[Site]]]


def profile(
    model: Any,
    *args: Any,
    label: int | str | Sequence[int | str] | None = None,
    cond: Cond = Cond(),
    sampling: Sampling | None = None,
    **settings: Any,
) -> Profile:
    """Run a call and say where its time goes: by part, operator class, site and forward pass, with MACs and bytes.

    The call runs three times: alone, counted, and under torch's profiler. Shares are of the profiled wall clock, to
    which they sum; what the profiler itself costs is the difference to the plain one. Weights do not matter here,
    shapes do.

    Example:
        >>> ditkit.profile(ditkit.load("emoji"), steps=10, policies="taylorseer").tables()  # doctest: +SKIP
        >>> ditkit.profile(pipe, "a red apple", num_inference_steps=4).save("outputs/profile")  # doctest: +SKIP

    Args:
        model: one of our models, in eval mode; a pipeline of diffusers, or what `accelerate` made of it.
        args, settings: of a pipeline, those of its call; of our models, words of `Sampling`, such as `steps=10`.
        label, cond, sampling: of our models, as `compare` takes them.

    Raises:
        ConfigError: no model or pipeline, a model that is compiled as a whole, a call that runs no denoiser, or a
            second profile at the same time.
        DitkitError: as the sampler or `accelerate` raises it.
    """
    if isinstance(model, str):
        raise ConfigError(
            f"profile: got the name {model!r}, expected a model; ditkit.load({model!r}) gives it"
        )
    if hasattr(model, "_orig_mod"):
        raise ConfigError(
            "profile: the model is compiled as a whole, so its parts cannot be told apart; expected the model "
            "itself, or one with compiled blocks"
        )
    with ExitStack() as stack:
        if isinstance(model, Denoiser):
            if args:
                raise ConfigError(f"profile: got {args[0]!r} beside a model, expected settings by name")
            call, denoisers, stages = _of_model(model, label, cond, sampling, settings)
            described = {"model": type(model).__name__}
        else:
            call, denoisers, stages = _of_pipeline(stack, model, args, settings)
            described = {"pipeline": type(model).__name__}
        found = account(call, denoisers, stages)
    roofs = measure_roofs(*device_of(denoisers[0][0]))
    return summed(found, denoisers, roofs, described | origin())


def summed(found: Account, denoisers: Denoisers, roofs: Any, settings: Any) -> Profile:
    """Return an account by parts."""
    parts: dict[str, str] = {}
    for _, sites in denoisers:
        parts |= settled_parts(found, sites)
    named: dict[tuple[str, str, Any], list[float]] = {}
    counts: tuple[Mapping[Key, float], ...] = (found.seconds, found.macs, found.bytes)
    for key in found.seconds.keys() | found.macs.keys() | found.bytes.keys():
        line = named.setdefault((key.stage, _part(key, parts), key.kind), [0.0, 0, 0])
        for i, counted in enumerate(counts):
            line[i] += counted.get(key, 0)
    entries = [Entry(*name, seconds, int(macs), int(size)) for name, (seconds, macs, size) in named.items()]
    lengths = sorted((at, parts[site], q, k, n) for (at, site, q, k), n in found.lengths.items())
    return Profile(
        entries=tuple(sorted((e for e in entries if e.seconds or e.macs), key=lambda e: -e.seconds)),
        sites={name: _site_cost(found, name, parts[name]) for name in found.calls},
        wall_seconds=found.wall_seconds,
        plain_seconds=found.plain_seconds,
        evaluations=tuple(found.evaluations),
        lengths=tuple(_merged(lengths)),
        roofs=roofs,
        uncounted=found.uncounted,
        settings=settings,
    )


def _part(key: Key, parts: dict[str, str]) -> str:
    if key.site:
        return parts[key.site]
    return "outside blocks" if key.stage == DENOISER else key.stage


def _site_cost(found: Account, name: str, part: str) -> SiteCost:
    seconds = sum(s for key, s in found.seconds.items() if key.site == name)
    macs = sum(n for key, n in found.macs.items() if key.site == name)
    return SiteCost(part, seconds, macs, found.calls[name], found.ran[name])


def _merged(rows: Sequence[tuple[int, str, int, int, int]]) -> list[tuple[int, str, int, int, int]]:
    merged: dict[tuple[int, str, int, int], int] = {}
    for *key, times in rows:
        merged[tuple(key)] = merged.get(tuple(key), 0) + times  # type: ignore[index, arg-type]
    return [(*key, times) for key, times in merged.items()]


def _of_model(
    model: Denoiser, label: Any, cond: Cond, sampling: Sampling | None, settings: dict[str, Any]
) -> tuple[Callable[[], object], Denoisers, dict[str, nn.Module]]:
    work = Sampler.of(model, label, cond=cond, sampling=sampling or Sampling(), **settings)
    guides = [net for net in work.sampling.guidance.networks().values() if net is not model]
    return work.draw, [(net, net.sites()) for net in (model, *guides)], {"codec": model.codec}


def _of_pipeline(
    stack: ExitStack, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[[], object], Denoisers, dict[str, nn.Module]]:
    from ditkit.pipelines.profiled import prepared

    return prepared(stack, pipe, args, kwargs)
