"""The arms of the claims of DTR (39) and Switch-DiT (29): small networks trained alike but for what time decides.

One plain run serves both systems. Arms have the same initial weights where they have the same tensors, the same
batches, noise, times and steps, and are judged on the same held-out draws.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from baselines import CHANNELS, CLASSES, SIZE, Waves
from ditkit.adapt import TaskRouting
from ditkit.bench.paired import paired_loss
from ditkit.core.convention import Convention
from ditkit.core.model import parameter_count
from ditkit.models.dit import DiT, DiTConfig
from ditkit.models.switch_dit import SwitchDiT, SwitchDiTConfig
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Power
from ditkit.train.loop import train
from ditkit.train.settings import Group, Settings
from ditkit.train.terms.diffusion_prior import DiffusionPrior
from ditkit.train.terms.min_snr import MinSNR
from ditkit.train.terms.regression import Regression
from ditkit.train.terms.uncertainty import RATE, UncertaintyWeighting
from ditkit.train.timesteps import Stratified

NOISE = Convention("ddpm", "noise", "index", "none")
"""DiT's, without the learned variance: the arms differ in the error that is judged, and the bound has a cost."""
SIZES: dict[str, Any] = {
    "size": SIZE,
    "patch": 4,
    "channels": CHANNELS,
    "width": 64,
    "depth": 4,
    "heads": 2,
    "classes": CLASSES,
    "convention": NOISE,
}
WIDER = 72
"""The width of a plain network of as many parameters as the one with experts."""
RATE_OF_WEIGHTS = 2e-3
PLAIN = Denoising((Regression(),))


@dataclass(frozen=True)
class Arm:
    """A training that differs from the plain one in this.

    Args:
        routing: the policy that it is under. prior: weight of the prior of a network with experts; None for no experts.
        width: of the network. objective: instead of the squared error alone.
    """

    routing: TaskRouting | None = None
    prior: float | None = None
    width: int = SIZES["width"]
    objective: Denoising = PLAIN


WEIGHED = Denoising((MinSNR(),))
UNCERTAIN = Denoising((UncertaintyWeighting(),), clock=Stratified(8))
OF_DTR: Mapping[str, Arm] = {
    "plain": Arm(),
    "DTR": Arm(TaskRouting()),
    "random masks": Arm(TaskRouting(routes="random")),
    "UW": Arm(objective=UNCERTAIN),
    "DTR, UW": Arm(TaskRouting(), objective=UNCERTAIN),
}
MORE: Mapping[str, Arm] = {
    "even windows": Arm(TaskRouting(alpha=1.0)),
    "Min-SNR": Arm(objective=WEIGHED),
    "DTR, Min-SNR": Arm(TaskRouting(), objective=WEIGHED),
}
"""Arms of DTR's that take half as long again."""
OF_SWITCH: Mapping[str, Arm] = {
    "plain": OF_DTR["plain"],
    "DTR": OF_DTR["DTR"],
    "Switch-DiT": Arm(prior=1.0),
    "no prior": Arm(prior=0.0),
    "wider": Arm(width=WIDER),
}


def trained(arm: Arm, steps: int, seed: int) -> DiT:
    """Train an arm on the toy latents; the averaged model."""
    network = made(arm, seed)
    objective = arm.objective
    if arm.prior:
        objective = replace(objective, terms=(*objective.terms, DiffusionPrior(arm.prior)))
    uncertain = any(isinstance(term, UncertaintyWeighting) for term in objective.terms)
    settings = Settings(
        steps=steps,
        batch=32,
        learning_rate=RATE_OF_WEIGHTS,
        warmup=20,
        cosine=True,
        clip=1.0,
        averages=(Power(0.1),),
        seed=seed,
        save_every=0,
        sheet_every=0,
        groups=(Group("uncertaintyweighting", RATE / RATE_OF_WEIGHTS),) if uncertain else (),
    )
    if arm.routing:
        network.adopt([arm.routing])
    with tempfile.TemporaryDirectory() as folder:
        return train(network, Waves(4096, seed=1), objective, settings, Path(folder))  # type: ignore[return-value]


def made(arm: Arm, seed: int) -> DiT:
    """Build the network of an arm; what it has in common with the plain one begins as there."""
    sizes = {**SIZES, "width": arm.width}
    torch.manual_seed(seed)
    plain = DiT(DiTConfig(**sizes))
    if arm.prior is None:
        return plain
    torch.manual_seed(1000 + seed)
    routed = SwitchDiT(SwitchDiTConfig(**sizes))
    routed.load_state_dict(plain.state_dict(), strict=False)
    return routed


@dataclass
class Arms:
    """Trained arms, and their losses on the same held-out draws, [seeds, draws], by their names."""

    steps: int
    models: dict[str, list[DiT]]
    losses: dict[str, Tensor]

    def difference(self, arm: str, rival: str) -> tuple[float, tuple[float, float]]:
        """Return the mean loss of an arm less a rival's, with its 95 % interval over seeds and draws."""
        return resampled(self.losses[arm] - self.losses[rival])

    def setting(self, *names: str) -> str:
        """Say in words what the figures rest on."""
        shown = ", ".join(
            f"{name} {self.losses[name].mean():.5f} ({self.scatter(name):.5f} over seeds)" for name in names
        )
        seeds = len(next(iter(self.models.values())))
        size = parameter_count(self.models["plain"][0])
        return f"DiT of {size:,} parameters on toy latents, {self.steps} steps of 32, {seeds} seeds; losses: {shown}"

    def scatter(self, name: str) -> float:
        """Return the standard deviation of an arm's mean loss over seeds."""
        return self.losses[name].mean(1).std().item()


def run(arms: Mapping[str, Arm], steps: int, seeds: int) -> Arms:
    """Train all arms of all seeds and judge them."""
    models: dict[str, list[DiT]] = {name: [] for name in arms}
    losses: dict[str, list[Tensor]] = {name: [] for name in arms}
    for seed in range(seeds):
        for name, arm in arms.items():
            models[name].append(trained(arm, steps, seed))
        judged = paired_loss({name: models[name][-1] for name in arms}, Waves(2048, seed=2))
        for name in arms:
            losses[name].append(judged.losses[name])
        print(f"seed {seed}:", {name: round(judged.mean(name), 5) for name in arms}, flush=True)
    return Arms(steps, models, {name: torch.stack(own) for name, own in losses.items()})


def resampled(difference: Tensor) -> tuple[float, tuple[float, float]]:
    """Return the mean of [seeds, draws] and Student's 95 % interval over the seeds' means."""
    own = difference.double().mean(1)
    return own.mean().item(), of_seeds(own)


def of_seeds(values: Tensor) -> tuple[float, float]:
    """Return Student's 95 % interval of the mean over seeds, [n]: with two of them it resolves little."""
    half = float(stats.t.ppf(0.975, len(values) - 1)) * values.std().item() / len(values) ** 0.5
    return values.mean().item() - half, values.mean().item() + half


def within(arms: Sequence[str], models: Mapping[str, Sequence[Any]]) -> str:
    """Say how many parameters some arms have."""
    return ", ".join(f"{name} {parameter_count(models[name][0]):,}" for name in arms)
