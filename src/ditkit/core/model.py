"""What every network is: a module with named sites, saved as a folder with config.json and safetensors."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from ditkit.core.codec import CODEC_CONFIG, CODEC_WEIGHTS, IDENTITY, Codec, Identity
from ditkit.core.cond import Cond
from ditkit.core.config import config_of
from ditkit.core.errors import CheckpointError, ConfigError, unknown
from ditkit.core.grid import Segment
from ditkit.core.policy import Policy
from ditkit.core.run import Site
from ditkit.core.spec import component, spec

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
DIGEST = "config_sha256"
"""Key of the weights' metadata: of the config.json that they were saved with."""
CODEC = "codec"
"""Folder of the codec, and key of config.json: of the config.json in that folder."""
FILES = (WEIGHTS, CONFIG, f"{CODEC}/{CODEC_CONFIG}", f"{CODEC}/{CODEC_WEIGHTS}")
POLICIES = "policies"
"""Key of config.json: texts of the policies that the weights were trained under."""
DESCRIBED = ("model", "config", "history", CODEC, POLICIES)
"""Keys of config.json."""


class Model(nn.Module, ModelHubMixin, ABC):
    """A network with sites. A subclass names its config's dataclass in `Config`; `__init__` takes one."""

    homes: ClassVar[tuple[str, ...]] = ("ditkit.models",)
    Config: ClassVar[type]
    config: Any
    history: tuple[Any, ...] = ()
    """What was done to the weights, training first; saved with them."""
    gradient_checkpointing: bool = False
    """Compute blocks again in the backward pass of training, instead of keeping what is inside them."""
    codec: Codec = IDENTITY
    """What makes this model's samples of signals, and back. Saved and loaded along; its weights are not the model's
    to train, and it goes to its input's device by itself."""
    policies: tuple[Policy, ...] = ()
    """What the weights are trained under; saved with them. Sampling is under those that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.learned = nn.ModuleDict()
        """What `policies` train of their own, by class name; sampling under a policy takes it from here."""

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

    @abstractmethod
    def layout(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        """The token segments of a call on a sample of `shape`, without the batch axis."""

    @property
    def recomputes(self) -> bool:
        """Whether blocks of this call are to be computed again in its backward pass."""
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    @property
    @abstractmethod
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample, without the batch axis."""

    @property
    def last_training(self) -> Mapping[str, Any] | None:
        """The last entry of `history` that names what the weights were trained on; None if no entry does."""
        runs = [run for run in self.history if isinstance(run, dict) and run.get("trained") is not None]
        return runs[-1] if runs else None

    @property
    def signal_shape(self) -> tuple[int, ...]:
        """The shape of what one sample decodes to, without the batch axis."""
        return self.codec.signal_shape(self.sample_shape)

    def adopt(self, policies: Sequence[Policy]) -> Self:
        """Train under `policies` from now on; parameters of their own are then the model's.

        They go on as the model has them, of a policy of that class and with the same shapes; else as they begin.

        Raises:
            ConfigError: a policy that config.json cannot name, so that what is trained under it could not be loaded.
        """
        for policy in policies:
            _check_named(policy)
        sites, known = self.sites(), dict(self.learned.items())
        begun = {type(policy).__name__: policy.modules(sites) for policy in policies}
        self.policies = tuple(policies)
        self.learned = nn.ModuleDict(
            {name: _taken(known.get(name), own) for name, own in begun.items() if own is not None}
        )
        others = (p for name, p in self.named_parameters() if not name.startswith("learned."))
        self.learned.to(next(others))
        return self

    def save(self, folder: str | Path, dtype: torch.dtype | None = None, history: Sequence[Any] = ()) -> Path:
        """config.json and safetensors in `folder`, with the codec's own in `codec`; all on disk before any takes its
        place.

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
        state = {
            k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in self.state_dict().items()
        }
        with self._codec_drafted(folder) as codec, replacing(folder / WEIGHTS) as weights:
            described = {
                "model": type(self).__name__,
                "config": dataclasses.asdict(self.config),
                "history": [*self.history, *history],
                **codec,
                **({POLICIES: [spec(policy) for policy in self.policies]} if self.policies else {}),
            }
            dump_state(weights, state, {DIGEST: digest(described)})
            to_disk(weights)  # then config.json takes its place; `load` finds out if these weights never do
            write_json(folder / CONFIG, described)
        return folder

    @contextmanager
    def _codec_drafted(self, folder: Path) -> Iterator[dict[str, str]]:
        """Yields what config.json says of the codec, whose files take their places after the model's."""
        if isinstance(self.codec, Identity):
            yield {}
            return
        with self.codec.drafted(folder / CODEC) as described:
            yield {CODEC: digest(described)}

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """A model saved by `save`, in float32 and eval mode.

        Raises:
            CheckpointError: the folder is incomplete, of another architecture, damaged, or a config, weights and
                codec that were not saved together (weights that do not say with which are taken as they are).
        """
        path, weights = Path(folder) / CONFIG, Path(folder) / WEIGHTS
        described = read_json(path)
        kind = model_class(described, path)
        if not issubclass(kind, cls):
            raise CheckpointError(f"{folder} holds a {kind.__name__}, expected a {cls.__name__}")
        config: Any = config_of(kind.Config, described.get("config"), path)
        model = kind.holding(config, read_state(weights), weights, _policies(described, path))
        if read_metadata(weights).get(DIGEST, saved := digest(described)) != saved:
            raise CheckpointError(
                f"{weights} was saved with another config than {path}: a save was interrupted, or one was edited"
            )
        model.history = tuple(described.get("history", ()))
        if CODEC in described:
            model.codec = _codec(described, path)
        return model

    @classmethod
    def holding(
        cls, config: Any, state: Mapping[str, Tensor], source: object, policies: Sequence[Policy] = ()
    ) -> Self:
        """A model in eval mode with the weights `state`; no memory is taken before their shapes are checked.

        Raises:
            CheckpointError: the tensors are not those of `config`; `source` is what the message names.
        """
        try:
            with torch.device("meta"):
                model = cls(config).adopt(policies)  # type: ignore[call-arg]
        except (RuntimeError, TypeError, OverflowError) as error:
            raise CheckpointError(
                f"{source}: the config's sizes make no tensor: {_first_line(error)}"
            ) from error
        fill(model, state, source)
        return model.eval()

    def with_weights(self, state: Mapping[str, Tensor], source: object) -> Self:
        """A copy in eval mode that holds `state` instead, with all else that is saved."""
        copy = self.holding(self.config, state, source, self.policies)
        copy.history, copy.codec = self.history, self.codec
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
    """A model of `forward(x, t, cond, run=DIRECT)`, x and its output [B, C, ...], t [B]; its config has a
    `convention`, which says what its numbers mean."""

    def sites(self) -> tuple[Site, ...]:
        """The sites of a network of one stack: `time`, `tokens`, `blocks`, what each block says of itself, and `head`.

        Where text stands in the sequence of the image, all of the stack is of the stream "joint".
        """
        parts: Any = self
        several = len({segment.stream for segment in self.layout(self.sample_shape)}) > 1
        stream, width = "joint" if several else "image", self.config.width
        return (
            Site("time", "time", width=width),
            Site("tokens", "tokens", stream, width),
            Site("blocks", "stack", stream, width),
            *(site for i, block in enumerate(parts.blocks) for site in block.sites(f"blocks.{i}", stream)),
            *parts.head.sites(),
        )

    @abstractmethod
    def unconditional(self, cond: Cond) -> Cond:
        """The same batch, told nothing."""


def model_class(described: Mapping[str, Any], source: Path) -> type[Model]:
    """The class that a config.json names.

    Raises:
        CheckpointError: it names none, or holds something that is not a model's.
    """
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
    """The policies that a config.json names."""
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


def _taken(known: nn.Module | None, begun: nn.Module) -> nn.Module:
    """`known`, if it is of the kind and the shapes of `begun`."""
    if type(known) is not type(begun):
        return begun
    held, wanted = ({k: v.shape for k, v in module.state_dict().items()} for module in (known, begun))
    return known if held == wanted else begun


def _codec(described: Mapping[str, Any], path: Path) -> Codec:
    """The codec beside a model's config.json, if it is the one that this was saved with."""
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
