"""Every way to make a pipeline of diffusers cheaper that is raced: one function each, as its documentation says.

The statements of a function are what a user writes to switch it on, and are counted from its source.
"""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

Told = dict[str, Any]
SetUp = Callable[[Any, Told], Any]  # pipeline, arguments of the calls to come -> what is called in its place
OURS, DIFFUSERS, CACHE_DIT = "ditkit", "diffusers", "cache_dit"


@dataclass(frozen=True)
class Contestant:
    """One method at one setting.

    Args:
        method, setting: its name in two parts. library: the package it needs.
        neutral: whether it is a setting that should skip nothing.
        steps: of a contestant that is asked for fewer than the others.
    """

    library: str
    method: str
    setting: str
    set_up: SetUp
    neutral: bool = False
    steps: int | None = None

    @property
    def name(self) -> str:
        return f"{self.method} {self.setting}".strip()

    @property
    def is_installed(self) -> bool:
        return find_spec(self.library) is not None

    def asked(self, told: Told) -> Told:
        return told if self.steps is None else told | {"num_inference_steps": self.steps}

    @property
    def lines(self) -> int:
        """Statements of the set-up, imports and inner ones too, but not what hands the pipeline back."""
        function: Any = self.set_up.func if isinstance(self.set_up, partial) else self.set_up
        (defined,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
        body = [node for node in ast.walk(defined) if isinstance(node, ast.stmt) and node is not defined]
        return sum(not _hands_back(node) for node in body)


def _hands_back(node: ast.stmt) -> bool:
    return isinstance(node, ast.Return) and isinstance(node.value, ast.Name)


def evaluations(told: Told) -> int:
    """Of a call; image-to-image starts late."""
    return int(told["num_inference_steps"] * told.get("strength", 1))


def exact(pipe: Any, told: Told) -> Any:
    return pipe


def accelerated(pipe: Any, told: Told, *, policies: tuple[str, ...] = ()) -> Any:
    import ditkit

    return ditkit.accelerate(pipe, *policies)


def taylorseer_cache(pipe: Any, told: Told, **setting: Any) -> Any:
    from diffusers import TaylorSeerCacheConfig

    pipe.transformer.enable_cache(TaylorSeerCacheConfig(**setting))
    return pipe


def first_block_cache(pipe: Any, told: Told, **setting: Any) -> Any:
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(**setting))
    return pipe


def faster_cache(pipe: Any, told: Told, **setting: Any) -> Any:
    from diffusers import FasterCacheConfig

    pipe.transformer.enable_cache(
        FasterCacheConfig(current_timestep_callback=lambda: pipe.current_timestep, **setting)
    )
    return pipe


def pyramid_attention_broadcast(pipe: Any, told: Told, **setting: Any) -> Any:
    from diffusers import PyramidAttentionBroadcastConfig

    pipe.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: pipe.current_timestep, **setting)
    )
    return pipe


def mag_cache(pipe: Any, told: Told, **setting: Any) -> Any:
    """Its calibration prints a list, which its documentation asks one to copy; one whole call."""
    from diffusers import MagCacheConfig

    steps = evaluations(told)
    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=steps))
    with redirect_stdout(io.StringIO()) as printed:
        pipe(**told)
    pipe.transformer.disable_cache()
    ratios = ast.literal_eval(printed.getvalue().strip().splitlines()[1])
    pipe.transformer.enable_cache(MagCacheConfig(mag_ratios=ratios, num_inference_steps=steps, **setting))
    return pipe


def db_cache(pipe: Any, told: Told, **setting: Any) -> Any:
    import cache_dit

    cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(**setting))
    return pipe


def db_cache_taylor(pipe: Any, told: Told, order: int, **setting: Any) -> Any:
    import cache_dit

    cache_dit.enable_cache(
        pipe,
        cache_config=cache_dit.DBCacheConfig(**setting),
        calibrator_config=cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order),
    )
    return pipe


def db_cache_mask(pipe: Any, told: Told, policy: str, order: int | None = None, **setting: Any) -> Any:
    import cache_dit

    mask = cache_dit.steps_mask(mask_policy=policy, total_steps=evaluations(told))
    cache_dit.enable_cache(
        pipe,
        cache_config=cache_dit.DBCacheConfig(
            steps_computation_mask=mask,
            steps_computation_policy="static",
            num_inference_steps=len(mask),
            **setting,
        ),
        calibrator_config=order and cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order),
    )
    return pipe


ATTENTION_OF_FLUX: Told = {
    "spatial_attention_block_skip_range": 2,
    "spatial_attention_timestep_skip_range": (-1, 901),
    "unconditional_batch_skip_range": 2,
    "attention_weight_callback": lambda module: 0.5,
    "is_guidance_distilled": True,
}
"""FasterCache's, as diffusers' tests of FLUX set it."""


TAUS = (0.03, 0.06, 0.13)
"""Of CG-Taylor on FLUX: its published "quality" and "fast", and one between them."""
EXACT = Contestant("diffusers", "exact", "", exact)


def fewer_steps(steps: int) -> Contestant:
    return Contestant("diffusers", "exact", f"in {steps} steps", exact, steps=steps)


def contestants() -> list[Contestant]:
    """Of each method some settings, its default among them, and one that should skip nothing."""
    return [*_ours(), *_of_diffusers(), *_of_cache_dit()]


def _ours() -> list[Contestant]:
    return [
        Contestant(OURS, "ditkit", "", accelerated),  # its default: a ConfidentTaylor list with N=3
        _policy("TaylorSeer", "N=3 O=1 W=2", "interval=3,order=1"),
        *(_seer(interval, order) for interval, order in ((2, 1), (3, 1), (4, 1), (4, 2), (6, 1))),
        *(_policy("ConfidentTaylor", f"tau={tau}", f"threshold={tau},first_order=1") for tau in TAUS),
        *(_policy("ConfidentTaylor", f"list N={n}", f"interval={n}") for n in (4, 5)),
        _policy("TaylorSeer", "N=3 O=1 W=3", "interval=3,order=1,warmup=3"),
        _policy("RAS", "50 %", ""),
        _policy("RAS", "50 % low", "selection=low"),
        _policy("RAS", "25 %", "ratio=0.25"),
        _policy("TaylorSeer", "N=1", "interval=1", neutral=True),
        _policy("ConfidentTaylor", "tau=0", "threshold=0", neutral=True),
        _policy("RAS", "100 %", "ratio=1", neutral=True),
    ]


def _seer(interval: int, order: int) -> Contestant:
    """With the slope from pure noise left out of the forecasts: it misleads by 8 dB (W=2 against W=3)."""
    setting = f"interval={interval},order={order},warmup=4"
    return _policy("TaylorSeer", f"N={interval} O={order}", setting)


def _policy(method: str, setting: str, fields: str, neutral: bool = False) -> Contestant:
    text = f"{method.lower()}:{fields}".strip(":")
    return Contestant(OURS, method, setting, partial(accelerated, policies=(text,)), neutral)


def _of_diffusers() -> list[Contestant]:
    one = partial(Contestant, DIFFUSERS)
    every: dict[int, Told] = {n: {"spatial_attention_block_skip_range": n} for n in (1, 2, 4)}
    lite = partial(taylorseer_cache, use_lite_mode=True)
    float32 = partial(lite, taylor_factors_dtype=torch.float32)
    return [
        one("TaylorSeerCache", "", taylorseer_cache),
        one("TaylorSeerCache", "lite", lite),
        one("TaylorSeerCache", "lite fp32", float32),
        one("TaylorSeerCache", "lite fp32 N=3", partial(float32, cache_interval=3)),
        *(
            one("FirstBlockCache", str(threshold), partial(first_block_cache, threshold=threshold))
            for threshold in (0.05, 0.1, 0.2)
        ),
        *(
            one("MagCache", str(threshold), partial(mag_cache, threshold=threshold))
            for threshold in (0.06, 0.24)
        ),
        one("FasterCache", "", partial(faster_cache, **ATTENTION_OF_FLUX)),
        *(one("PAB", str(n), partial(pyramid_attention_broadcast, **every[n])) for n in (2, 4)),
        one("TaylorSeerCache", "N=1", partial(taylorseer_cache, cache_interval=1), True),
        one("FirstBlockCache", "0", partial(first_block_cache, threshold=0.0), True),
        one("MagCache", "0", partial(mag_cache, threshold=0.0), True),
        one("FasterCache", "1", partial(faster_cache, **ATTENTION_OF_FLUX | every[1]), True),
        one("PAB", "1", partial(pyramid_attention_broadcast, **every[1]), True),
    ]


def _of_cache_dit() -> list[Contestant]:
    """Its default computes the first 8 blocks, which are all that a small FLUX has: F1 is the least it allows."""
    one = partial(Contestant, CACHE_DIT)
    warm: Told = {"Fn_compute_blocks": 1, "max_warmup_steps": 4}
    at = {limit: {**warm, "residual_diff_threshold": limit} for limit in (0.0, 0.08, 0.2)}
    taylor = partial(db_cache_taylor, order=1)
    mask = partial(db_cache_mask, Fn_compute_blocks=1)
    return [
        one("DBCache", "", db_cache),
        *(one("DBCache", f"F1 {limit}", partial(db_cache, **at[limit])) for limit in (0.08, 0.2)),
        *(one("DBCache Taylor", f"F1 {limit}", partial(taylor, **at[limit])) for limit in (0.08, 0.2)),
        *(one("DBCache mask", policy, partial(mask, policy=policy)) for policy in ("medium", "fast")),
        one("DBCache mask", "fast Taylor", partial(mask, policy="fast", order=1)),
        one("DBCache", "F1 0", partial(db_cache, **at[0.0]), True),
        one("DBCache Taylor", "F1 0", partial(taylor, **at[0.0]), True),
    ]
