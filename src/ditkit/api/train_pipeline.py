"""A pipeline's transformer trained on latents and embedded prompts: fine-tuned, adapted, pruned or distilled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ditkit.api.compress import as_transforms
from ditkit.core.checkpoint import read_json
from ditkit.core.codec import FINGERPRINT, fingerprint
from ditkit.core.errors import CheckpointError, ConfigError
from ditkit.core.model import CONFIG, parameter_count
from ditkit.core.policy import Policy, with_inherent
from ditkit.core.spec import components, spec
from ditkit.core.transform import Transform
from ditkit.data.content import content_digest
from ditkit.data.latents import LatentSet
from ditkit.train.denoising import Denoising
from ditkit.train.ema import Constant
from ditkit.train.loop import train
from ditkit.train.objective import Term
from ditkit.train.parts import train_only
from ditkit.train.record import CONTENT
from ditkit.train.settings import Settings
from ditkit.train.state import STATE
from ditkit.train.terms.regression import Regression
from ditkit.train.terms.variational_bound import VariationalBound
from ditkit.train.timesteps import LogitNormal, Shifted, Uniform

if TYPE_CHECKING:
    from ditkit.hosts.denoiser import HostDenoiser
    from ditkit.hosts.hosted import Host

INDEX, TRANSFORMER, SCHEDULER = "model_index.json", "transformer", "scheduler"
EXPERT = "transformer_2"
AUTO = "auto"
"""The parts that transforms add, and policies beside them; all of the transformer where no transform adds any."""
SETTINGS = Settings(
    steps=1000,
    batch=4,
    learning_rate=1e-5,
    clip=1.0,
    trained=AUTO,
    averages=(Constant(0.99),),
    save_every=100,
    sheet_every=0,
)
Timesteps = Uniform | LogitNormal | Shifted


@dataclass(frozen=True, kw_only=True)
class PipelineTraining:
    """A training of a pipeline's transformer.

    Args:
        source: a pipeline of diffusers, its folder, or a transformer's folder, which diffusers or ditkit wrote.
        data: the safetensors file of latents and embedded prompts.
        transforms: put on the transformer before, in order. policies: that it is trained under.
        terms: of the loss; by default `Regression`, and `VariationalBound` of a network that learns its variance.
        timesteps: by default logit-normal ones, moved as the scheduler moves its steps; of discrete steps uniform ones.
        settings: of the run; `trained="auto"` is what transforms add, and policies beside them, or all where no
            transform adds any.
        dropout: share of samples whose prompt or label is taken away; by default 0.1, and 0 where the file does not say
            what stands in its place. guidance: the scale that a network distilled from guidance is told.
    """

    source: Any
    data: str | Path
    transforms: tuple[Transform, ...] = ()
    policies: tuple[Policy, ...] = ()
    terms: tuple[Term, ...] = ()
    timesteps: Timesteps | None = None
    settings: Settings = SETTINGS
    dropout: float | None = None
    guidance: float = 1.0

    def base(self) -> HostDenoiser:
        """Return a copy of the transformer as it is.

        Raises:
            ConfigError: nothing there is a transformer that can be trained. CheckpointError: it is damaged.
            DataError: the file of latents is missing, or does not fit.
        """
        from ditkit.hosts.denoiser import HostDenoiser, samples_of

        host = host_of(self.source)
        samples = samples_of(host.transformer, self.data)
        return HostDenoiser.of(host, samples, self.scheduler(), self.dropout, self.guidance)

    def scheduler(self) -> dict[str, Any] | None:
        """Return the config of the scheduler, if there is one."""
        if not isinstance(self.source, str | Path):
            from ditkit.hosts.paths import config_of_scheduler

            found = getattr(self.source, SCHEDULER, None)
            return None if found is None else config_of_scheduler(found)
        folder = Path(self.source).expanduser()
        path = (folder if (folder / INDEX).is_file() else folder.parent) / SCHEDULER / "scheduler_config.json"
        return read_json(path) if path.is_file() else None

    def samples(self, model: HostDenoiser) -> LatentSet:
        from ditkit.hosts.denoiser import samples_of

        return samples_of(model.transformer, self.data)

    def objective(self, model: HostDenoiser) -> Denoising:
        """Return what is minimised."""
        from ditkit.hosts.denoiser import shift_for

        convention = model.config.convention
        bound = (VariationalBound(),) if convention.extra == "variance" else ()
        times: Timesteps = Uniform()
        if not convention.discrete:
            shift = shift_for(model, self.scheduler())
            times = LogitNormal() if shift == 1 else Shifted(shift, LogitNormal())
        return Denoising(self.terms or (Regression(), *bound), self.timesteps or times)

    def resolved(self, model: HostDenoiser) -> Settings:
        """Return the settings, with the parts that are trained by name."""
        if self.settings.trained != AUTO:
            return self.settings
        added = [type(t).__name__.lower() for t in model.transforms if t.trains(model)]
        if added:
            added += [name.lower() for name in model.learned]
        return replace(self.settings, trained="+".join(dict.fromkeys(added)) or "all")

    def put_on(self, model: HostDenoiser, structure_alone: bool) -> HostDenoiser:
        """Put transforms and policies on the model; with `structure_alone` a state brings their values."""
        policies = with_inherent(model, self.policies) if self.policies else model.policies
        if structure_alone and self.transforms:
            model.adopt(()).shaped(self.transforms)
        else:
            for transform in self.transforms:
                model.transform(transform)
        return model.adopt(policies)


def train_pipeline(
    source: Any,
    data: str | Path,
    *transforms: Transform | str,
    out: str | Path,
    policies: Sequence[Policy | str] = (),
    terms: Sequence[Term | str] = (),
    timesteps: Timesteps | None = None,
    settings: Settings = SETTINGS,
    dropout: float | None = None,
    guidance: float = 1.0,
    resume: bool = False,
) -> Host:
    """Train the transformer of a diffusers pipeline; the trained one is returned, and saved in `out`/model.

    The pipeline itself stays as it is: `pipe.transformer = trained.transformer` puts the result in. What diffusers' own
    class can open is saved as its folder; all else (LoRA that is not merged, policies) as one that `ditkit.load` opens.

    Args:
        source: a pipeline of diffusers, its folder, or a transformer's folder.
        data: one safetensors file: `latents` [N, C, ...] as the transformer has them, and embedded prompts under the
            names of the pipeline's arguments.
        transforms: put on first, in order, each itself or its text: "lora:rank=8", "kept:blocks=0+2".
        out: folder of the run. resume: go on with the run that is there.
        policies, terms, timesteps, settings, dropout, guidance: as of `PipelineTraining`.

    Raises:
        ConfigError, ConflictError: something does not fit, before the first step. DataError: the file does not.
        CheckpointError: a folder is damaged.
    """
    training = PipelineTraining(
        source=source,
        data=data,
        transforms=as_transforms(transforms) if transforms else (),
        policies=components("policies", Policy, policies),  # type: ignore[type-abstract]
        terms=components("terms", Term, terms),  # type: ignore[type-abstract]
        timesteps=timesteps,
        settings=settings,
        dropout=dropout,
        guidance=guidance,
    )
    return run_training(training, Path(out), resume)


def run_training(training: PipelineTraining, folder: Path, resume: bool = False) -> Host:
    """Train as `training` says; weights, state and losses go to `folder`.

    Raises:
        ConfigError: resuming another run than the folder's. Those of `train_pipeline`.
    """
    model = training.base()
    digest, samples = fingerprint(model.state_dict()), training.samples(model)
    start = _start(training, model)
    model = training.put_on(model, resume and (folder / STATE).exists())
    settings, run = training.resolved(model), training.settings
    model.history += (
        {"trained": Path(training.data).name, "options": {}, "steps": run.steps, "batch": run.batch},
    )
    trained: Any = train(
        model,
        samples,
        training.objective(model),
        settings,
        folder,
        about={
            "data": str(training.data),
            CONTENT: content_digest(training.data),
            "init": {"source": _named(training.source), FINGERPRINT: digest},
        },
        resume=resume,
        start=start,
    )
    host: Host = trained.host()
    return host


def describe(training: PipelineTraining) -> str:
    """Describe the training and its size, in lines; load the transformer and the file, train nothing.

    Raises:
        ConfigError, DataError: what `run_training` would refuse before its first step.
    """
    model = training.put_on(training.base(), structure_alone=False)
    objective, settings = training.objective(model), training.resolved(model)
    objective.check(model)
    samples, total = training.samples(model), parameter_count(model)
    train_only(model, settings.trained)
    config, length = model.config, settings.steps * settings.batch / len(samples)
    lines = {
        "transformer": f"{config.name} of {_named(training.source)}",
        "data": f"{training.data}, {samples.facts()}",
        "convention": ", ".join(f"{k} {v}" for k, v in asdict(config.convention).items()),
        "dropout": config.label_dropout,
        "guidance": config.guidance,
        **({"transforms": " ".join(map(spec, model.transforms))} if model.transforms else {}),
        **({"policies": " ".join(map(spec, model.policies))} if model.policies else {}),
        **{f"objective.{k}": v for k, v in vars(objective).items()},
        **{f"settings.{k}": v for k, v in vars(settings).items()},
        "parameters": f"{total:,}, trained {parameter_count(model):,}",
        "length": f"{settings.steps} steps x {settings.batch} = {length:.1f} epochs",
        "result": "a folder of diffusers" if is_plain(model) else "a folder that ditkit.load opens",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def is_plain(model: HostDenoiser) -> bool:
    """Return whether diffusers' own class opens what `save` writes."""
    try:
        model.host().plain()
    except ConfigError:
        return False
    return True


def host_of(source: Any) -> Host:
    """Return a copy of the transformer of a pipeline, of its folder, or of a transformer's folder.

    Raises:
        ConfigError: there is none, or there are two experts. CheckpointError: it is damaged.
    """
    from ditkit.hosts.hosted import Host

    if not isinstance(source, str | Path):
        found = getattr(source, TRANSFORMER, None)
        if not isinstance(found, nn.Module):
            raise ConfigError(
                f"train: got {type(source).__name__}, expected a pipeline of diffusers with a transformer"
            )
        _refuse_experts(getattr(source, EXPERT, None) is not None, type(source).__name__)
        host = Host.around(deepcopy(found))
        host.transformer.float().eval().requires_grad_(True)
        return host
    folder = Path(source).expanduser()
    if (folder / INDEX).is_file():
        _refuse_experts((folder / EXPERT).is_dir(), str(folder))
        folder = folder / TRANSFORMER
    if not (folder / CONFIG).is_file():
        raise ConfigError(
            f"{source} holds neither a pipeline of diffusers with a transformer nor a transformer, expected one"
        )
    loaded = Host.load(folder)
    if not isinstance(loaded, Host):
        raise CheckpointError(
            f"{source} holds a {type(loaded).__name__}, expected a transformer of diffusers"
        )
    return loaded


def _refuse_experts(two: bool, name: str) -> None:
    if two:
        raise ConfigError(
            f"{name} has two experts, {TRANSFORMER} and {EXPERT}, each of a part of the times, expected one transformer"
        )


def _start(training: PipelineTraining, model: HostDenoiser) -> Callable[[], Any] | None:
    """Return what gives the transformer as it was, if a term compares with it."""
    if not any(term.needs_teacher for term in training.terms):
        return None
    copy = model.with_weights(model.state_dict(), "teacher")
    return lambda: copy


def _named(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else type(source).__name__
