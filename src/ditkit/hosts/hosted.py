"""A diffusers transformer as a model that transforms act on; saved as diffusers' own folder where that opens it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ditkit.core.checkpoint import fill, read_json, read_state, to_disk
from ditkit.core.errors import CheckpointError, ConfigError, DitkitError, unknown
from ditkit.core.grid import Segment
from ditkit.core.model import CONFIG, Model
from ditkit.core.policy import Policy
from ditkit.core.run import DIRECT, Run, Site
from ditkit.core.transform import Report, Stacked, Transform, described, transforms_of
from ditkit.hosts.family import families, family, has_sites, transformers
from ditkit.hosts.numbering import numbers_of, without_gaps
from ditkit.hosts.view import View, is_running, restore, running, view

KEY = "_ditkit"
"""The key of the changes of the structure in diffusers' config.json, which ignores it."""
APPLIED = "ditkit_transforms"
"""Attribute of a transformer: the same."""
ADOPTED = "ditkit_adopted"
"""Attribute of a transformer: what it was trained under, an `Adopted`."""


class Adopted(NamedTuple):
    """The policies that a transformer was trained under, and what they learned."""

    policies: tuple[Policy, ...] = ()
    learned: nn.ModuleDict | None = None


def adopted(transformer: nn.Module) -> Adopted:
    """Return what a transformer was trained under; nothing, of most."""
    found: Adopted = vars(transformer).get(ADOPTED, Adopted())
    return found


def trained_under(transformer: Any) -> tuple[Policy, ...]:
    """Return the inherent policies that a transformer was trained under."""
    return tuple(
        policy for policy in adopted(transformer).policies if policy.inherent and policy != policy.exact()
    )


def mark(transformer: nn.Module, policies: Sequence[Policy], learned: nn.ModuleDict) -> None:
    """Note on a transformer what it was trained under; without the inherent ones it refuses to be called from now on.

    A plain pipeline would leave them out without a word.
    """
    vars(transformer)[ADOPTED] = Adopted(tuple(policies), learned)
    if policies and _guard not in transformer._forward_pre_hooks.values():
        transformer.register_forward_pre_hook(_guard)


@dataclass(frozen=True)
class HostConfig:
    """The class and config of a transformer of diffusers.

    Args:
        name: of its class. arguments: its config, as JSON text.
    """

    name: str = "DiTTransformer2DModel"
    arguments: str = "{}"


class Host(Model):
    """A transformer of diffusers with its sites; `transform` acts on the module itself, which a pipeline may hold."""

    Config = HostConfig
    config: HostConfig
    transformer: Any

    def __init__(self, config: HostConfig) -> None:
        kind = _class_of(config.name)
        self._set(config, kind.from_config(json.loads(config.arguments)))

    @classmethod
    def around(cls, transformer: Any) -> Self:
        """Build the model around a transformer, which is not copied.

        Raises:
            ConfigError: no view is known for its class. ConflictError: something else decides what it computes.
        """
        family(transformer)
        given = dict(transformer.config)
        kept = given.get(KEY, {})
        arguments = {k: v for k, v in given.items() if not k.startswith("_")} | kept.get("original", {})
        model = cls.__new__(cls)
        model._set(HostConfig(type(transformer).__name__, json.dumps(arguments)), transformer)
        listed = transforms_of(kept.get("transforms"), type(transformer).__name__)
        model.transforms = vars(transformer).get(APPLIED) or tuple(listed)
        under = adopted(transformer)
        model.policies = under.policies
        model.learned = nn.ModuleDict() if under.learned is None else under.learned
        return model

    def _set(self, config: HostConfig, transformer: nn.Module) -> None:
        super().__init__()
        self.config, self.transformer = config, view(transformer)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """None that is known before a call: a pipeline says the size."""
        return ()

    def layout(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        """Raise: it depends on the arguments of a pipeline's call."""
        raise ConfigError(
            f"{self.config.name}: its layout is that of a call; sample it in a pipeline, by ditkit.accelerate"
        )

    def sites(self) -> tuple[Site, ...]:
        return family(self.transformer).sites(self.transformer)

    def stacks(self) -> Mapping[str, Stacked]:
        known = family(self.transformer).stacks
        return {name: stack._replace(path=f"transformer.{stack.path}") for name, stack in known.items()}

    def forward(self, *args: Any, run: Run = DIRECT, **kwargs: Any) -> Any:
        """Call the transformer."""
        with running(run):
            return self.transformer(*args, **kwargs)

    def transform(self, transform: Transform, calibration: Any = None) -> Report:
        report = super().transform(transform, calibration)
        self.note()
        return report

    def adopt(self, policies: Sequence[Policy]) -> Self:
        super().adopt(policies)
        self.note()
        return self

    def note(self) -> None:
        """Let the transformer say what it is now: its config where diffusers' own class opens it, else its refusal."""
        vars(self.transformer)[APPLIED] = self.transforms
        mark(self.transformer, self.policies, self.learned)
        vars(self.transformer).pop("save_pretrained", None)
        try:
            fields = self.plain()
        except ConfigError as error:
            vars(self.transformer)["save_pretrained"] = partial(_refuse, str(error))
            return
        if fields is not None:
            arguments = json.loads(self.config.arguments)
            fields = {**{name: arguments[name] for name in self._changed()}, **fields}
            original = {name: arguments[name] for name in fields}
            kept = {"transforms": [described(one) for one in self.transforms], "original": original}
            self.transformer.register_to_config(**fields, **{KEY: kept})

    def _changed(self) -> list[str]:
        """Fields of diffusers' config that earlier transforms wrote."""
        return list(dict(self.transformer.config).get(KEY, {}).get("original", {}))

    def plain(self) -> Mapping[str, Any] | None:
        """Fields of diffusers' config with which its own class builds this; None where nothing was done.

        Raises:
            ConfigError: names the transform that has no such form, and the two ways on; or the policies that it was
                trained under.
        """
        if self.policies:
            under = ", ".join(map(str, self.policies))
            raise ConfigError(
                f"{self.config.name} was trained under {under}, which plain diffusers would "
                "leave out; save it by ditkit.hosts.hosted.Host.around(transformer).save(folder), which "
                "ditkit.load opens"
            )
        if not self.transforms and KEY not in dict(self.transformer.config):
            return None
        fields: dict[str, Any] = {}
        for transform in self.transforms:
            own = transform.plain(self)
            if own is None:
                raise ConfigError(
                    f"{self.config.name}: {type(transform).__name__} has no form that plain diffusers opens; save it "
                    "by ditkit.hosts.hosted.Host.around(transformer).save(folder), which ditkit.load opens, or finish "
                    "it first (LoRA: Merged())"
                )
            fields |= own
        return fields

    def save(self, folder: str | Path, dtype: torch.dtype | None = None, history: Any = ()) -> Path:
        """Save a folder of diffusers if its own class opens the result, else one of ours; `ditkit.load` opens both."""
        try:
            self.plain()
        except ConfigError:
            return super().save(folder, dtype, history)
        copy = (
            self.transformer
            if dtype is None
            else self.with_weights(self.state_dict(), "copy").transformer.to(dtype)
        )
        _write(copy, Path(folder))
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Either form.

        Raises:
            CheckpointError: the folder is damaged, or its weights are not those of its config.
        """
        content = read_json(Path(folder) / CONFIG)
        if "_class_name" not in content:
            return super().load(folder)
        try:
            kind = _class_of(str(content["_class_name"]))
            if gapped := _with_gaps(Path(folder), content, kind):
                return gapped
            transformer, loading_info = kind.from_pretrained(folder, output_loading_info=True)
        except (ConfigError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{folder}: {str(error).splitlines()[0]}") from error
        if wrong := [*loading_info["missing_keys"], *loading_info["unexpected_keys"]]:
            raise CheckpointError(
                f"{folder}: its config and its weights disagree on {wrong[0]!r} ({len(wrong)} in all)"
            )
        model = cls.around(transformer.eval())
        vars(transformer)[APPLIED] = model.transforms
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
        """As of any model; built in memory, as diffusers makes tables that are not saved."""
        with torch.random.fork_rng(devices=()), torch.device("cpu"):
            model = cls(config)
            try:
                model.shaped(transforms).adopt(policies)
            except DitkitError as error:
                raise CheckpointError(f"{source}: {error}") from error
        fill(model, state, source)
        model.note()
        return model.eval()

    def sharing(self, state: Mapping[str, Tensor]) -> Self:
        """As of any model; built in memory, as `holding` does."""
        with torch.random.fork_rng(devices=()), torch.device("cpu"):
            copy = type(self)(self.config).shaped(self.transforms).adopt(self.policies)
        copy.load_state_dict(state, assign=True)
        return copy


def transform_in_place(
    transformer: Any, transforms: tuple[Transform, ...], calibration: Any = None
) -> list[Report]:
    """Transform a transformer that others hold, with its view or without, as it was.

    Raises:
        ConfigError, ConflictError: one does not fit; those before it were applied.
    """
    families()
    had_sites = has_sites(transformer)
    try:
        model = Host.around(transformer)
        return [model.transform(one, calibration) for one in transforms]
    finally:
        if not had_sites and has_sites(transformer):
            restore(transformer)


def _write(transformer: Any, folder: Path) -> None:
    """Write a folder of diffusers: every file is whole, and those of an earlier one with other weights go.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".draft", dir=folder) as draft:
            transformer.save_pretrained(draft)
            files = sorted(Path(draft).iterdir(), key=lambda file: file.name == CONFIG)
            for file in files:
                to_disk(file)
                file.replace(folder / file.name)
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error.strerror or error}") from error
    for old in folder.glob("*.safetensors*"):
        if old.name not in [file.name for file in files]:
            old.unlink()


def _with_gaps(folder: Path, content: Mapping[str, Any], kind: Any) -> Any:
    """Load an export of a pruned transformer whose blocks have the numbers that they had before; None for any other.

    Raises:
        CheckpointError: its weights are not those of its config with as many blocks as there are.
    """
    files = sorted(folder.glob("*.safetensors"))
    names = []
    for file in files:
        with safe_open(file, "pt") as opened:
            names += list(opened.keys())
    with torch.device("meta"):
        arguments = {k: v for k, v in content.items() if not k.startswith("_")}
        stacks = family(kind.from_config(arguments)).stacks
    gaps = {stack: numbers_of(names, stack.path) for stack in stacks.values()}
    gaps = {
        stack: numbers for stack, numbers in gaps.items() if numbers and numbers != list(range(len(numbers)))
    }
    if not gaps:
        return None
    state = {name: value for file in files for name, value in read_state(file).items()}
    for stack, numbers in gaps.items():
        state = without_gaps(state, stack.path)
        arguments[stack.field] = len(numbers)
        for name in stack.indexed:
            arguments[name] = tuple(numbers.index(n) for n in arguments.get(name) or () if n in numbers)
    model = Host.holding(
        HostConfig(kind.__name__, json.dumps(arguments)),
        {f"transformer.{k}": v for k, v in state.items()},
        folder,
    )
    return model


def _guard(transformer: nn.Module, _: tuple[Any, ...]) -> None:
    """Refuse a call without the inherent policies: whoever runs a transformer under some says so."""
    if not is_running() and (under := trained_under(transformer)):
        raise ConfigError(
            f"{type(transformer).__name__} was trained under {', '.join(map(str, under))}; expected a call through "
            "ditkit.accelerate(pipe), which runs it so"
        )


def _refuse(reason: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise ConfigError(reason)


def _class_of(name: str) -> Any:
    families()
    known = {kind.__name__: kind for kind in transformers() if not isinstance(kind, View)}
    if name not in known:
        raise ConfigError("Host: " + unknown("transformer", name, known))
    return known[name]
