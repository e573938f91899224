"""VDT's small experiment: one network told by masks, beside what it could have been, on a ball that bounces.

    python benchmarks/video_masks.py
    python benchmarks/video_masks.py --networks mixed predict

Stopped at any moment, the same command goes on. Every network has the same size, data, order and number of steps,
but for those that end early, with a learning rate that falls to 0 by then: `mixed_early` has a quarter of the steps,
`predict_fewer` and `interpolate_fewer` have as many clips of their task as `mixed` has. PSNR is over what was made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from torch import Tensor

from bouncing_ball import BouncingBall, Exam
from common import device, record, show
from ditkit.api.generate import generate
from ditkit.core.cond import Cond
from ditkit.core.convention import Convention
from ditkit.core.errors import ConfigError, unknown
from ditkit.core.model import parameter_count
from ditkit.metrics.baselines import blended
from ditkit.metrics.features import load_efficientnet_lite0
from ditkit.metrics.perceptual import ClipDistance
from ditkit.models.vdt import VDT, VDTConfig
from ditkit.tasks.video.masks import MaskMixture
from ditkit.tasks.video.recipe import EVERY_MASK, MaskedClipDataset
from ditkit.tasks.video.scores import CLIP_FEATURE
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Power
from ditkit.train.loop import train
from ditkit.train.record import RECIPE
from ditkit.train.settings import Settings
from ditkit.train.timesteps import LogitNormal
from expectations import Claim, judged, shown
from forecasting import spent
from replacement import Replacement

NETWORK = VDTConfig(
    channels=1,
    frames=16,
    size=16,
    patch=4,
    width=128,
    depth=4,
    heads=4,
    convention=Convention(prediction="data"),
)
TASKS = ("predict", "interpolate")
TRUTH = "held-out clips"
DISTANCES = ("frechet", "looks", "motion")
COLUMNS = (
    "steps",
    "parameters",
    "training_seconds",
    *(f"{task}_psnr_db" for task in TASKS),
    "after_bounce_px",
    *DISTANCES,
)
"""None where not asked: `after_bounce_px` is of predictions, the distances are of clips made of nothing."""
TRAINED_ON, HELD_OUT, OTHERS = range(3)
"""Seeds of the balls."""
REPLACED = {"replacement": False, "replacement, fresh noise": True}
"""Ways to fill in by the network `unconditional`, and whether noise is drawn anew at each step."""
EQUAL, CLEARLY = 0.9, 2.0
"""Share of a specialist's PSNR that counts as equal, and the ratio of Frechet distances that counts as worse."""


SHARE = (1 - EVERY_MASK.region) / len(EVERY_MASK.frames)
"""Of the clips of a mixture, those of one task."""


def held(cond: Cond) -> Tensor:
    assert cond.context is not None and cond.mask is not None
    return blended(cond.context, cond.mask)


def black(cond: Cond) -> Tensor:
    assert cond.context is not None
    return cond.given(torch.full_like(cond.context, -1))


WITHOUT_NETWORK: Mapping[str, Callable[[Cond], Tensor]] = {
    "nearest or blended frame": held,
    "black frames": black,
}


CLAIMS = (
    Claim(
        "masks in training beat replacement in sampling",
        tuple(("mixed", other, "predict_psnr_db") for other in REPLACED),
    ),
    Claim(
        "given frames among the tokens beat adaLN",
        tuple(("mixed", "adaln", f"{task}_psnr_db") for task in TASKS),
    ),
    Claim(
        f"one network has {EQUAL:.0%} of the PSNR of each specialist",
        tuple(("mixed", task, f"{task}_psnr_db") for task in TASKS),
        EQUAL,
    ),
    Claim(
        f"without attention over time clips are {CLEARLY:g} times as far from the data",
        (("without_time", "mixed", "frechet"),),
        CLEARLY,
    ),
    Claim(
        "the velocity after a bounce is less wrong with more training",
        (("mixed_early", "mixed", "after_bounce_px"),),
    ),
)
"""The specification's, section 2 of its checks."""


@dataclass(frozen=True)
class Variant:
    """A network, by what it has of its own.

    Args:
        masks: that it is trained under. network: changes to its config. share: of the steps.
        completes: masks that it is scored under. imagines: whether its clips made of nothing are.
    """

    masks: MaskMixture = EVERY_MASK
    network: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0
    completes: tuple[str, ...] = TASKS
    imagines: bool = False


def only(kind: str) -> MaskMixture:
    return MaskMixture(region=0, frames=(kind,))


VARIANTS: Mapping[str, Variant] = {
    "mixed": Variant(imagines=True),
    "mixed_early": Variant(share=0.25),
    "adaln": Variant(network={"conditioning": "adaln"}),
    "unconditional": Variant(only("unconditional"), completes=()),
    **{kind: Variant(only(kind), completes=(kind,)) for kind in TASKS},
    **{f"{kind}_fewer": Variant(only(kind), share=SHARE, completes=(kind,)) for kind in TASKS},
    "without_time": Variant(network={"mode": "image"}, imagines=True),
}


@dataclass(frozen=True)
class Arguments:
    """Sizes of the experiment.

    Args:
        steps, batch: of each training. clips: held-out clips to be completed. sampler_steps: of Euler's method.
        imagined: clips made of nothing for the Frechet distance; 0 for no distance.
        keep: folder of all trainings; where they are, they go on.
        networks: to train; with fewer than all there is no table.
    """

    steps: int = 1200
    batch: int = 16
    clips: int = 128
    imagined: int = 400
    sampler_steps: int = 25
    keep: Path = Path("runs/video_masks")
    networks: tuple[str, ...] = tuple(VARIANTS)

    def __post_init__(self) -> None:
        for name in self.networks:
            if name not in VARIANTS:
                raise ConfigError(unknown("network", name, VARIANTS))
        if self.imagined:
            CLIP_FEATURE.check(self.imagined, self.imagined)


class Trained(NamedTuple):
    """A network after its training, its steps, and the processor's seconds that they took."""

    model: VDT
    steps: int
    seconds: int


def trained(name: str, arguments: Arguments, network: VDTConfig = NETWORK) -> Trained:
    """A network after its training, which goes on where an earlier call was stopped.

    Raises:
        ConfigError: the folder's training was another.
    """
    variant, run = VARIANTS[name], arguments.keep / name
    steps = max(1, round(variant.share * arguments.steps))
    balls = BouncingBall(network.frames, network.shape[1], seed=TRAINED_ON)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = VDT(replace(network, **variant.network))
    settings = Settings(
        steps=steps,
        batch=arguments.batch,
        optimizer="muon",
        learning_rate=2e-3,
        warmup=min(100, steps // 10),
        cosine=True,
        betas=(0.9, 0.99),
        clip=1.0,
        precision="bf16",
        averages=(Power(0.05),),
        save_every=100,
        sheet_every=0,
    )
    # a resume may change the number of steps, but along half a cosine that is another training
    about = {"experiment": {"balls": asdict(balls), "masks": asdict(variant.masks), "steps": steps}}
    objective = Denoising(timesteps=LogitNormal(0.0, 1.0))
    begun = (run / RECIPE).exists()
    data = MaskedClipDataset(balls, variant.masks)
    averaged = train(model, data, objective, settings, run, about=about, resume=begun)
    assert isinstance(averaged, VDT)
    return Trained(averaged, steps, round(spent(run)))


def rows(models: Mapping[str, Trained], arguments: Arguments) -> list[dict[str, Any]]:
    """A row a network, then what is made by replacement, without a network, and the clips themselves."""
    frames, side, _ = models["mixed"].model.config.shape
    exam = Exam.of(BouncingBall(frames, side, seed=HELD_OUT, length=arguments.clips), TASKS)
    steps = arguments.sampler_steps
    found: dict[str, dict[str, Any]] = {}
    for name, own in models.items():
        found[name] = exam.scores(partial(completed, own.model, steps), VARIANTS[name].completes)
        found[name] |= {"steps": own.steps, "training_seconds": own.seconds}
        found[name] |= {"parameters": parameter_count(own.model)}
    blind = models["unconditional"].model
    for name, fresh in REPLACED.items():
        found[name] = exam.scores(partial(replaced, blind, steps, fresh))
    for name, complete in WITHOUT_NETWORK.items():
        found[name] = exam.scores(complete)
    found[TRUTH] = {"after_bounce_px": exam.after_bounce(exam.clips)}
    for name, distance in distances(models, arguments).items():
        found[name] |= {key: getattr(distance, key) for key in DISTANCES}
    return [{"made_by": name, **dict.fromkeys(COLUMNS), **row} for name, row in found.items()]


def completed(model: VDT, steps: int, cond: Cond) -> Tensor:
    """Clips [B, 1, T, H, W] by a network that is told what is given."""
    assert cond.mask is not None
    return drawn_by(model, steps, len(cond.mask), cond=cond)


def replaced(model: VDT, steps: int, fresh: bool, cond: Cond) -> Tensor:
    """Clips [B, 1, T, H, W] by a network that is told nothing."""
    assert cond.mask is not None
    count = len(cond.mask)
    return drawn_by(model, steps, count, batch_size=count, solver=Replacement(cond, fresh))


def drawn_by(model: VDT, steps: int, count: int, **options: Any) -> Tensor:
    return generate(
        model, seeds=range(count), steps=steps, **{"guidance": 1.0, "batch_size": 32, **options}
    ).samples


def distances(models: Mapping[str, Trained], arguments: Arguments) -> dict[str, ClipDistance]:
    """From held-out clips to as many made of nothing, and to others of the same kind: the least that can be asked."""
    if not (count := arguments.imagined):
        return {}
    frames, side, _ = models["mixed"].model.config.shape
    features = partial(CLIP_FEATURE.extract, load_efficientnet_lite0())
    real, others = (
        features(BouncingBall(frames, side, seed=seed).clips(torch.arange(count)))
        for seed in (HELD_OUT, OTHERS)
    )
    found = {TRUTH: CLIP_FEATURE.distance(real, others)}
    for name in (name for name, variant in VARIANTS.items() if variant.imagines):
        drawn = drawn_by(models[name].model, arguments.sampler_steps, count)
        found[name] = CLIP_FEATURE.distance(real, features(drawn.clamp(-1, 1)))
    return found


def judge(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    """`CLAIMS` with their figures."""
    return judged(CLAIMS, rows, named="made_by")


def main(arguments: Arguments) -> None:
    models = {name: trained(name, arguments) for name in arguments.networks}
    if models.keys() != VARIANTS.keys():
        return
    found = rows(models, arguments)
    verdicts = judge(found)
    title = f"a bouncing ball, {arguments.clips} held-out clips; Frechet over {CLIP_FEATURE.name}; {device()}"
    for head, table in ((title, found), ("claims", verdicts)):
        show(head, [{key: shown(value) for key, value in row.items()} for row in table])
    record("video_masks", [*found, *verdicts])


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
