"""Models: networks with named sites, saved as a folder with config.json and safetensors."""

from __future__ import annotations

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from torch import Tensor, nn

from ditkit.core.catalog import find
from ditkit.core.checkpoint import (
    digest,
    dump_state,
    fill,
    read_json,
    read_metadata,
    read_state,
    replacing,
    to_disk,
    write_json,
)
from ditkit.core.codec import CODEC_CONFIG, CODEC_WEIGHTS, IDENTITY, Codec, Identity, last_training
from ditkit.core.cond import UNDECLARED, Cond
from ditkit.core.condition import Condition
from ditkit.core.config import ModelConfig, config_of
from ditkit.core.errors import CheckpointError, ConfigError, DitkitError, unknown
from ditkit.core.grid import Segment
from ditkit.core.policy import Policy
from ditkit.core.run import Site
from ditkit.core.spec import component, spec
from ditkit.core.trajectory import Trajectory
from ditkit.core.transform import (
    Report,
    Stacked,
    Transform,
    check_named,
    described,
    origin_of,
    standing,
    transforms_of,
)

LOG = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
DIGEST = "config_sha256"
"""Key of the weights' metadata: of the config.json that they were saved with."""
HOST = "Host"
"""The model that holds a transformer of diffusers, in a folder of ours or of diffusers'; no backbone of `models`."""
CODEC = "codec"
"""Folder of the codec, and key of config.json: of the config.json in that folder."""
FILES = (WEIGHTS, CONFIG, f"{CODEC}/{CODEC_CONFIG}", f"{CODEC}/{CODEC_WEIGHTS}")
POLICIES = "policies"
"""Key of config.json: texts of the policies that the weights were trained under."""
TRANSFORMS = "transforms"
"""Key of config.json: what was done to the structure that the config gives, in order."""
TIMESTEP = "time.embedding"
"""The site of the embedding of the time alone, in a denoiser of one stack."""
TASK = "task"
"""Key of config.json: the name of the task that the weights were trained for."""
DESCRIBED = ("model", TASK, "config", "history", CODEC, POLICIES, TRANSFORMS)
"""Keys of config.json."""


class Model(nn.Module, ModelHubMixin, ABC):
    """A network with sites. A subclass names its config's dataclass in `Config`; `__init__` takes one."""

    homes: ClassVar[tuple[str, ...]] = ("ditkit.models",)
    Config: ClassVar[type]
    config: Any
    history: tuple[Any, ...] = ()
    """The steps that the weights went through, training first; saved with them."""
    gradient_checkpointing: bool = False
    """Compute blocks again in the backward pass of training, instead of keeping what is inside them."""
    task: str = ""
    """Name of the task (`ditkit.core.task`) that the weights were trained for; a class has that of its paper."""
    codec: Codec = IDENTITY
    """The coder from signals to this model's samples, and back.

    Saved and loaded along; its weights are not the model's to train, and it goes to its input's device by itself.
    """
    policies: tuple[Policy, ...] = ()
    """The policies that the weights are trained under; saved with them.

    Sampling is under those that are inherent and those that it is given.
    """
    transforms: tuple[Transform, ...] = ()
    """The changes of the structure that the config gives, in order; saved, and replayed whenever it is rebuilt."""

    def __init__(self) -> None:
        super().__init__()
        self.learned = nn.ModuleDict()
        """The weights that `policies` train of their own, by class name; sampling under a policy takes them here."""

    def __setattr__(self, name: str, value: Any) -> None:
        """`codec` is kept beside the model, not in it: among its modules it would be trained and saved as a part.

        Raises:
            ShapeError: the model's samples are not latents of the codec.
        """
        if name != CODEC:
            super().__setattr__(name, value)
            return
        value.signal_shape(self.sample_shape)
        object.__setattr__(self, name, value.eval().requires_grad_(False))

    @abstractmethod
    def sites(self) -> tuple[Site, ...]:
        """Every place a policy can act on, in the order of the forward pass."""

    def layout(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        """List the token segments of a call on a sample of `shape`, without the batch axis; none without a grid."""
        return ()

    @property
    def recomputes(self) -> bool:
        """True if blocks of this call are to be computed again in its backward pass."""
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample, without the batch axis; empty where samples have no shape in common."""
        return ()

    @property
    def last_training(self) -> Mapping[str, Any] | None:
        """The last entry of `history` that names the data of a training; None if no entry does."""
        return last_training(self.history)

    @property
    def signal_shape(self) -> tuple[int, ...]:
        """The shape of what one sample decodes to, without the batch axis."""
        return self.codec.signal_shape(self.sample_shape)

    def adopt(self, policies: Sequence[Policy]) -> Self:
        """Train under `policies` from now on; parameters of their own are then the model's.

        They go on as the model has them, where it has that policy; else as they begin.

        Raises:
            ConfigError: a policy that config.json cannot name, so that what is trained under it could not be loaded;
                an inherent one of another model; or what the model has learned of it has other shapes.
        """
        for policy in policies:
            _check_named(policy)
            if policy.inherent:
                policy.check_model(self)
        sites, known = self.sites(), dict(self.learned.items())
        begun = {type(policy).__name__: policy.modules(sites) for policy in policies}
        taken = {name: _taken(name, known.get(name), own) for name, own in begun.items() if own is not None}
        if fresh := [name for name in taken if name not in known and not _on_meta(self)]:
            LOG.info("%s: what %s learns begins anew", type(self).__name__, " and ".join(fresh))
        self.policies, self.learned = tuple(policies), nn.ModuleDict(taken)
        self.learned.to(next(p for name, p in self.named_parameters() if not name.startswith("learned.")))
        return self

    def stacks(self) -> Mapping[str, Stacked]:
        """List the stacks of blocks that a transform may name, by the names of their sites; none by default."""
        return {}

    def parts(self) -> Mapping[str, set[str]]:
        """Name the weights of parts of its own that training may choose (`Settings.trained`), by the part."""
        return {}

    def origin(self, name: str) -> str:
        """Return the name that a site or tensor had before all `transforms`."""
        return origin_of(self.transforms, name)

    def transform(self, transform: Transform, calibration: Any = None) -> Report:
        """Apply `transform` in place and list it; the neutral setting does nothing.

        What adopted policies learned at a site goes where the site went.

        Args:
            calibration: samples, for a transform whose values follow from what is seen.

        Raises:
            ConfigError, ConflictError, ShapeError: it does not fit the model or the calibration, or an adopted policy
                not what the model would become. Nothing was changed then.
        """
        if transform == transform.exact():
            return {}
        check_named(transform)
        transform.check(self)
        transform = transform.resolved(self, calibration)
        listed = standing((*self.transforms, transform))
        trial = self.rebuilt(listed)
        Trajectory(trial.sites(), self.policies, 1)
        learned, self.learned = self.learned, nn.ModuleDict()
        with torch.random.fork_rng(devices=()):
            _, report = transform.apply(self, calibration)
        self.transforms = listed
        self.history += ({"transform": described(transform), "report": dict(report)},)
        self._check_structure(transform, trial)
        if self.policies:
            self.adopt(self.policies)
            self._keep_learned(learned, transform)
        self.train(self.training)
        return report

    def shaped(self, transforms: Sequence[Transform]) -> Self:
        """Build the structure of `transforms`, in order, whose tensors are to be filled.

        Raises:
            ConfigError, ConflictError: one does not fit what those before it leave.
        """
        for transform in transforms:
            transform.check(self)
            transform.shape(self)
            self.transforms = (*self.transforms, transform)
        return self

    def rebuilt(self, transforms: Sequence[Transform]) -> Self:
        """Build the structure that `transforms` make of the config's, on the meta device.

        Without the weights that policies learn.
        """
        with torch.device("meta"):
            bare: Self = type(self)(self.config)  # type: ignore[call-arg]
            return bare.shaped(transforms)

    def _keep_learned(self, before: nn.ModuleDict, transform: Transform) -> None:
        """Put the learned modules of sites that outlived a transform under the names that the sites have now."""
        held: dict[str, Any] = dict(before.items())
        for policy, own in self.learned.items():
            if not isinstance(own, nn.ModuleDict):
                continue
            for key in tuple(own.keys()):
                was = transform.origin(key.replace("/", ".")).replace(".", "/")
                if was and was in held.get(policy, ()):
                    own[key] = held[policy][was]

    def _check_structure(self, transform: Transform, expected: Model) -> None:
        """Refuse a transform of two minds: what `apply` makes is what `shape` makes."""
        own, other = (
            {k: v.shape for k, v in model.state_dict().items() if not k.startswith("learned.")}
            for model in (self, expected)
        )
        if own != other:
            name = next(k for k in {**own, **other} if own.get(k) != other.get(k))
            raise ConfigError(
                f"{type(transform).__name__}: its apply makes {name!r} of {own.get(name)}, its shape of "
                f"{other.get(name)}, expected the same"
            )

    def save(self, folder: str | Path, dtype: torch.dtype | None = None, history: Sequence[Any] = ()) -> Path:
        """Write config.json, safetensors and the codec into `folder`; all are on disk before any takes its place.

        Weights or a codec saved with another config, as a kill between them leaves them, are refused by `load`.

        Args:
            dtype: store floating-point weights in this type; not the codec's.
            history: what was done to the model since it was loaded; config.json keeps all of it.

        Raises:
            ConfigError: `dtype` cannot hold weights, or the folder cannot be written.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise ConfigError(f"weights are saved in a floating-point type, not {dtype}")
        folder = Path(folder)
        for transform in self.transforms:
            transform.ready(self)
        kept = tuple(ending for transform in self.transforms for ending in transform.keeps)
        state = {
            k: v.to(dtype) if dtype and v.is_floating_point() and not k.endswith(kept) else v
            for k, v in self.state_dict().items()
        }
        with self._codec_drafted(folder) as codec, replacing(folder / WEIGHTS) as weights:
            content = {
                "model": type(self).__name__,
                **({TASK: self.task} if self.task else {}),
                "config": dataclasses.asdict(self.config),
                "history": [*self.history, *history],
                **codec,
                **({POLICIES: [spec(policy) for policy in self.policies]} if self.policies else {}),
                **({TRANSFORMS: [described(t) for t in self.transforms]} if self.transforms else {}),
            }
            dump_state(weights, state, {DIGEST: digest(content)})
            to_disk(weights)  # then config.json takes its place; `load` finds out if these weights never do
            write_json(folder / CONFIG, content)
        return folder

    @contextmanager
    def _codec_drafted(self, folder: Path) -> Iterator[dict[str, str]]:
        """Yield the codec's entry of config.json; the codec's files take their places after the model's."""
        if isinstance(self.codec, Identity):
            yield {}
            return
        with self.codec.drafted(folder / CODEC) as content:
            yield {CODEC: digest(content)}

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Load a model saved by `save`, in float32 and eval mode.

        Raises:
            CheckpointError: the folder is incomplete, of another architecture, damaged, or a config, weights and
                codec that were not saved together (weights that do not say with which are taken as they are).
        """
        path, weights = Path(folder) / CONFIG, Path(folder) / WEIGHTS
        content = read_json(path)
        kind = model_class(content, path)
        if "_class_name" in content and kind is not cls:
            return kind.load(folder)
        if not issubclass(kind, cls):
            raise CheckpointError(f"{folder} holds a {kind.__name__}, expected a {cls.__name__}")
        config: Any = config_of(kind.Config, content.get("config"), path)
        policies, transforms = _policies(content, path), transforms_of(content.get(TRANSFORMS), path)
        model = kind.holding(config, read_state(weights), weights, policies, transforms)
        if read_metadata(weights).get(DIGEST, saved := digest(content)) != saved:
            raise CheckpointError(
                f"{weights} was saved with another config than {path}: a save was interrupted, or one was edited"
            )
        model.history = tuple(content.get("history", ()))
        model.task = content.get(TASK, kind.task)
        if CODEC in content:
            model.codec = _codec(content, path)
        return model

    @classmethod
    def holding(
        cls,
        config: Any,
        state: Mapping[str, Tensor],
        source: object,
        policies: Sequence[Policy] = (),
        transforms: Sequence[Transform] = (),
    ) -> Self:
        """Build a model in eval mode with the weights `state`; no memory is taken before their shapes are checked.

        Raises:
            CheckpointError: the tensors are not those of `config` and `transforms`, or these do not fit; `source` is
                what the message names.
        """
        try:
            with torch.device("meta"):
                model: Self = cls(config)  # type: ignore[call-arg]
                model = _replayed(model, transforms, source).adopt(policies)
        except (RuntimeError, TypeError, OverflowError) as error:
            raise CheckpointError(
                f"{source}: the config's sizes make no tensor: {_first_line(error)}"
            ) from error
        fill(model, _upgraded(state, policies, model.sites()), source)
        empty = [name for name, v in (*model.named_parameters(), *model.named_buffers()) if v.is_meta]
        if empty:
            raise CheckpointError(f"{source}: {empty[0]!r} has no value, as it is not among what is saved")
        return model.eval()

    def with_weights(self, state: Mapping[str, Tensor], source: object) -> Self:
        """Return a copy in eval mode that holds `state` instead, with all else that is saved."""
        copy = self.holding(self.config, state, source, self.policies, self.transforms)
        copy.history, copy.codec, copy.task = self.history, self.codec, self.task
        return copy

    def as_teacher(self, given: Model) -> Model:
        """Return a loaded model in the form in which it can be asked what this one is."""
        return given

    def sharing(self, state: Mapping[str, Tensor]) -> Self:
        """Return a copy whose tensors are those of `state` themselves: what is written to them, it follows."""
        copy = self.rebuilt(self.transforms)
        with torch.device("meta"):
            copy.adopt(self.policies)
        copy.load_state_dict(state, assign=True)
        return copy

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        dtype: torch.dtype | None = None,
        config: None = None,
        model_card_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """`save` under the hub's name for it, as `push_to_hub` calls it.

        The mixin's own would delete an earlier config before it writes.

        Args:
            config: not taken; a model saves its own.
            model_card_kwargs: if given, a README.md is made of the hub's template, unless there is one.
        """
        if config is not None:
            raise ConfigError(f"save_pretrained: a {type(self).__name__} saves its own config, not another")
        folder = self.save(save_directory, dtype)
        if model_card_kwargs is not None and not (folder / "README.md").exists():
            ModelHubMixin.generate_model_card(self, **model_card_kwargs).save(folder / "README.md")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **download: Any) -> Self:
        """`load` from a folder, or from a repository of the hub.

        Args:
            download: options of `huggingface_hub.snapshot_download`: revision, token, cache_dir ...

        Raises:
            CheckpointError: there is no such folder and no such repository, or what is there is damaged.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            return cls.load(folder)
        try:
            return cls.load(snapshot_download(str(folder), allow_patterns=FILES, **download))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"no model folder and no model of the hub at {folder}: {_first_line(error)}"
            ) from error


class Denoiser(Model):
    """A model of `forward(x, t, cond, run=DIRECT)`, x and its output [B, C, ...], t [B].

    Its config has a `convention`, which says what its numbers mean.
    """

    completes: ClassVar[bool] = False
    """True if `Cond.context` and `Cond.mask` are read: samples can be given in part."""
    embeds_time: ClassVar[bool] = False
    """True if the site `time` has a site `TIMESTEP` inside."""

    def sites(self) -> tuple[Site, ...]:
        """List the sites of a network of one stack: `time`, `tokens`, `blocks`, those of each block, and the head's.

        Where text stands in the sequence of the image, all of the stack is of the stream "joint".
        """
        parts: Any = self
        with_text = any(segment.stream == "text" for segment in self.layout(self.sample_shape))
        stream, width = "joint" if with_text else "image", self.config.width
        return (
            Site("time", "time", width=width),
            *([Site(TIMESTEP, "timestep", width=width)] if self.embeds_time else []),
            Site("tokens", "tokens", stream, width),
            Site("blocks", "stack", stream, width),
            *(site for i, block in enumerate(parts.blocks) for site in block.sites(f"blocks.{i}", stream)),
            *parts.head.sites(),
        )

    branches: ClassVar[tuple[str, ...]] = ("cond", "uncond")
    """Names of the guidance branches that `branch` knows."""

    @property
    def conditions(self) -> Mapping[str, Condition]:
        """The conditions that the model can be given, by name: fields of `Cond`, and streams."""
        return self.config.conditions if isinstance(self.config, ModelConfig) else UNDECLARED

    @abstractmethod
    def unconditional(self, cond: Cond) -> Cond:
        """Return the conditioning of the same batch with nothing given; a text may be of another length."""

    def branch(self, cond: Cond, name: str) -> Cond:
        """Return the conditioning of a guidance branch, one of `branches`, for the batch that `cond` is of.

        Raises:
            ConfigError: there is no such branch.
        """
        if name == "cond":
            return cond
        if name == "uncond":
            return self.unconditional(cond)
        raise ConfigError(f"{type(self).__name__}: " + unknown("guidance branch", name, self.branches))


def model_class(described: Mapping[str, Any], source: Path) -> type[Model]:
    """Return the class that a config.json names.

    Raises:
        CheckpointError: it names none, or holds something that is not a model's.
    """
    if described.get("model") == HOST or "_class_name" in described:
        host: type[Model] = getattr(import_module("ditkit.hosts.hosted"), HOST)
        return host
    for key in described:
        if key not in DESCRIBED:
            raise CheckpointError(f"{source}: " + unknown("key", key, DESCRIBED))
    if not isinstance(described.get("history", []), list):
        raise CheckpointError(f"{source}: 'history' should be a list")
    name = described.get("model")
    if not isinstance(name, str):
        raise CheckpointError(
            f"{source}: no 'model' that names an architecture; is this a ditkit model folder?"
        )
    try:
        return find(Model, name)  # type: ignore[type-abstract]
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _policies(described: Mapping[str, Any], path: Path) -> list[Policy]:
    """Build the policies that a config.json names."""
    texts = described.get(POLICIES, [])
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise CheckpointError(f"{path}: {POLICIES!r} should be a list of texts, not {texts!r:.80}")
    try:
        return [component(Policy, text) for text in texts]  # type: ignore[type-abstract]
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check_named(policy: Policy) -> None:
    """Refuse a policy whose text makes no equal one."""
    try:
        named = component(Policy, spec(policy))  # type: ignore[type-abstract]
    except ConfigError as error:
        raise ConfigError(f"{policy} could not be loaded with the model: {error}") from error
    if named != policy:
        expected = f"{type(named).__module__}.{type(named).__name__}"
        raise ConfigError(f"{policy} is of {type(policy).__module__}, its name is that of {expected}")


def _taken(name: str, known: nn.Module | None, begun: nn.Module) -> nn.Module:
    """`known`, which has the shapes of `begun`; or `begun`, where nothing is known.

    Raises:
        ConfigError: the shapes are others.
    """
    if known is None:
        return begun
    held, wanted = ({k: tuple(v.shape) for k, v in module.state_dict().items()} for module in (known, begun))
    if held != wanted:
        key = next(k for k in {**held, **wanted} if held.get(k) != wanted.get(k))
        raise ConfigError(
            f"{name}: the model has learned {key!r} of {held.get(key)}, this setting has {wanted.get(key)}; "
            "adopt no policy of that class first, to begin anew"
        )
    return known


def _replayed(model: Any, transforms: Sequence[Transform], source: object) -> Any:
    """`shaped`, whose refusals are the folder's."""
    try:
        return model.shaped(transforms)
    except DitkitError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _upgraded(
    state: Mapping[str, Tensor], policies: Sequence[Policy], sites: Sequence[Site]
) -> Mapping[str, Tensor]:
    """`state`, what an older version saved of policies under today's names."""
    for policy in policies:
        state = policy.upgraded(state, sites)
    return state


def _on_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _codec(described: Mapping[str, Any], path: Path) -> Codec:
    """Load the codec beside a model's config.json, if it is the one that this was saved with."""
    folder = path.parent / CODEC
    if digest(read_json(folder / CODEC_CONFIG)) != described[CODEC]:
        raise CheckpointError(
            f"{folder} is another codec than {path} was saved with: a save was interrupted, or one was edited"
        )
    return Codec.load(folder)


def parameter_count(module: nn.Module) -> int:
    """Trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
