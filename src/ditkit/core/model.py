"""What every network of ours is: a module with named sites, saved as a folder with config.json and safetensors."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from torch import nn

from ditkit.core.catalog import find
from ditkit.core.checkpoint import fill, read_json, read_state, replacing, write_json, write_state
from ditkit.core.cond import Cond
from ditkit.core.convention import Convention
from ditkit.core.errors import CheckpointError, ConfigError, nearest, unknown
from ditkit.core.grid import Segment
from ditkit.core.run import Site

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


class Model(nn.Module, ModelHubMixin, ABC):
    """A network with sites. A subclass names its config's dataclass in `Config` and takes one in `__init__`."""

    homes: ClassVar[tuple[str, ...]] = ("ditkit.models",)
    Config: ClassVar[type]
    config: Any

    @abstractmethod
    def sites(self) -> tuple[Site, ...]:
        """Every place a policy can act on, in the order of the forward pass."""

    @abstractmethod
    def layout(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        """The token segments of a call on a sample of `shape`, without the batch axis."""

    @abstractmethod
    def unconditional(self, cond: Cond) -> Cond:
        """The same batch, told nothing."""

    @property
    @abstractmethod
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample, without the batch axis."""

    def save(self, folder: str | Path, dtype: torch.dtype | None = None, history: tuple[Any, ...] = ()) -> Path:
        """config.json and safetensors in `folder`, both complete before either takes its place.

        Args:
            dtype: store floating-point weights in this type.
            history: what was done to the model, kept in config.json.
        """
        folder = Path(folder)
        described = {"model": type(self).__name__, "config": dataclasses.asdict(self.config), "history": list(history)}
        state = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in self.state_dict().items()}
        with replacing(folder / WEIGHTS) as weights, replacing(folder / CONFIG) as config:
            write_state(weights, state)
            write_json(config, described)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """A model saved by `save`, in float32 and eval mode.

        Raises:
            CheckpointError: the folder is incomplete, of another architecture, or damaged.
        """
        folder = Path(folder)
        described = read_json(folder / CONFIG)
        kind = model_class(described, folder / CONFIG)
        if not issubclass(kind, cls):
            raise CheckpointError(f"{folder} holds a {kind.__name__}, expected a {cls.__name__}")
        model = kind(config_of(kind.Config, described.get("config"), folder / CONFIG))
        fill(model, read_state(folder / WEIGHTS), folder / WEIGHTS)
        return model.eval()  # type: ignore[return-value]

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:  # type: ignore[override]
        """`save`, and with `push_to_hub=True` the upload; the mixin's own would drop an earlier config first."""
        push = kwargs.pop("push_to_hub", False)
        repo = kwargs.pop("repo_id", None)
        self.save(save_directory, dtype=kwargs.pop("dtype", None))
        return self.push_to_hub(repo_id=repo or Path(save_directory).name, **kwargs) if push else None

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save(save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, revision: str | None = None, **kwargs: Any) -> Self:
        if Path(model_id).is_dir():
            return cls.load(model_id)
        wanted = {k: kwargs[k] for k in ("cache_dir", "token", "local_files_only") if k in kwargs}
        return cls.load(snapshot_download(model_id, revision=revision, allow_patterns=[WEIGHTS, CONFIG], **wanted))


def model_class(described: Mapping[str, Any], source: Path) -> type[Model]:
    """The class that a config.json names."""
    name = described.get("model")
    if not isinstance(name, str):
        raise CheckpointError(f"{source}: no 'model' that names an architecture; is this a ditkit model folder?")
    try:
        return find(Model, name)  # type: ignore[type-abstract]
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from error


def config_of(kind: type, given: Any, source: object) -> Any:
    """A frozen config dataclass from JSON: unknown and missing keys and values of another type are refused."""
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{source}: 'config' should be an object, not {type(given).__name__}")
    known = {f.name: f for f in dataclasses.fields(kind)}
    for key in given:
        if key not in known:
            raise CheckpointError(f"{source}: " + unknown("config key", key, known))
    values = {name: _value(known[name], v, source) for name, v in given.items()}
    missing = [n for n, f in known.items() if n not in values and f.default is dataclasses.MISSING]
    if missing:
        raise CheckpointError(f"{source}: missing config key {missing[0]!r}{nearest(missing[0], given)}")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {error}") from error


def _value(field: dataclasses.Field[Any], given: Any, source: object) -> Any:
    """JSON has no tuples and no dataclasses: turn lists and objects back, and check the type against the default's."""
    if field.name == "convention":
        return config_of(Convention, given, source)
    default = field.default
    if isinstance(default, tuple) and isinstance(given, list):
        return tuple(given)
    if default is not dataclasses.MISSING:
        number = isinstance(default, float) and isinstance(given, int) and not isinstance(given, bool)
        if type(given) is not type(default) and not number:
            expected = type(default).__name__
            raise CheckpointError(f"{source}: {field.name}={given!r} should be of type {expected}")
    return given


def parameter_count(module: nn.Module) -> int:
    """Trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)

