"""`ditkit train`: a recipe, with its settings overridden by flags."""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from ditkit import recipes
from ditkit.api.compress import as_transforms
from ditkit.cli.flags import flags_of, with_flags
from ditkit.cli.options import Number, Options, Policies, is_main_process, options_of, policies_of, writable
from ditkit.cli.parsing import Command, Group
from ditkit.cli.train_flags import Groups, Rules, Transforms, groups_of, inherit_of
from ditkit.cli.train_pipeline import command_of as pipeline_command_of
from ditkit.core.errors import ConfigError
from ditkit.core.spec import spec
from ditkit.tasks.recipe import Recipe, describe, train_recipe

Build = Callable[[], Recipe]
LEFT = ("model", "losses.jsonl", "samples", "snapshots", "tensorboard", "state.safetensors")
"""The files that a run may leave in its folder."""


def found() -> dict[str, Build]:
    """Every recipe by name: the public functions of the modules of `ditkit.recipes`."""
    names = [module.name for module in pkgutil.iter_modules(recipes.__path__)]
    modules = [importlib.import_module(f"{recipes.__name__}.{name}") for name in names]
    return {
        name.replace("_", "-"): function
        for module in modules
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }


def command_of(name: str, build: Build) -> Command:
    """`ditkit train NAME`."""
    recipe = build()
    own, run_flags = flags_of(recipe.model), flags_of(recipe.settings)

    def run(
        *,
        out: Path = Path("runs") / name,
        data: str = recipe.data,
        option: Options = (),
        max_bad: Number = recipe.max_bad,
        codec: str = recipe.codec,
        init: str = recipe.init,
        policy: Policies = (),
        transform: Transforms = (),
        inherit: Rules = (),
        group: Groups = (),
        network: Any = own,
        settings: Any = run_flags,
        resume: bool = False,
        dry_run: bool = False,
    ) -> None:
        rule = inherit_of(inherit) or recipe.inherit
        if init and rule is None and network != own:
            changed = next(name for name, given in vars(network).items() if given != getattr(own, name))
            raise ConfigError(
                f"--{changed.replace('_', '-')} with --init {init}: the network is the one there, expected none, or "
                "--inherit for the weights of another one"
            )
        typed = options_of(data, option, max_bad)
        bad = typed.pop("max_bad", None)
        under = tuple(policies_of(policy)) if policy else recipe.policies
        chosen = replace(
            recipe,
            model=with_flags(recipe.model, network),
            data=data,
            options={**(recipe.options if data == recipe.data else {}), **typed},
            max_bad=bad,
            codec=codec,
            init=init,
            policies=under,
            transforms=as_transforms(transform) if transform else recipe.transforms,
            inherit=rule,
            settings=with_flags(recipe.settings, settings, groups=groups_of(group, recipe.settings.groups)),
        )
        if dry_run:
            print(describe(chosen))
            return
        if is_main_process() and importlib.util.find_spec("tensorboard") is None:
            print("TensorBoard is not installed: the losses go to losses.jsonl alone", file=sys.stderr)
        with writable(out):
            train_recipe(chosen, out, resume=resume)
        if is_main_process():
            there = ", ".join(name for name in LEFT if (out / name).exists())
            flags = [word for one in under for word in ("--policy", spec(one))]
            if recipe.then_data:
                flags += ["--data", chosen.next_data]
            command = shlex.join([*recipe.then.split(), str(out / "model"), *flags])
            print(f"wrote {out}: {there}; go on with: {command}")

    words = f"{name} --init MODEL" if any(term.needs_teacher for term in recipe.objective.active) else name
    for argument, flags in (("network", own), ("settings", run_flags)):  # each config has its own
        flattened: Any = Annotated[type(flags), tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands]
        run.__annotations__[argument] = flattened
    run.__doc__ = f"""{(inspect.getdoc(build) or name).strip()}

    Examples:
        ditkit train {words} --dry-run
        ditkit train {words} --out runs/mine
        ditkit train {words} --out runs/mine --resume
        ditkit train {words} --data my-data --steps 5000 --batch 32

    Writes into the folder of --out:
        model/               the averaged weights, which {recipe.then} takes
        samples/             a sheet of samples every so often
        losses.jsonl         a line a step
        state.safetensors    what --resume goes on from

    Args:
        out: Folder of the run.
        data: {recipe.sources}
        option: Of the loader of --data, such as repair=sort,interpolate, fps=10 or columns=load,wind. Repeat it for
            several.
        max_bad: Damaged files of a folder to leave out; more is an error. Default: 10.
        codec: Folder of a codec that ditkit train image-vae made; its latents are learned instead of pixels.
        init: Go on from a trained model: a folder, a shipped model or an id of the hub; its sizes are taken.
        policy: Train under a policy, as {recipe.then} --policy takes it, or under none: exact. Repeat it for several.
            Default: {" ".join(map(spec, recipe.policies)) or "exact"}.
        transform: Change the network first, as ditkit compress does: kept:blocks=0+2+3. Repeat it for several; these
            replace the recipe's.
        inherit: Take the weights of --init for a network of another class or size: same, for tensors of the same name;
            skip=PATTERN, those that begin anew; OWN=OTHER, those taken from others, as blocks.1.*=blocks.3.*, where a
            star is one part of a name, at the end all the rest. Repeat it for several.
        group: A part of the weights with a learning rate or decay of its own: lora:rate=10, norms:rate=2,decay=0.
            Repeat it for several; these replace the recipe's.
        resume: Go on where the run in --out was stopped.
        dry_run: Print the settings, the parameters and the cost, and stop.
    """.replace("\n    ", "\n")
    return run


train = Group(
    prog="ditkit train",
    about="Train a model as a recipe says, or a diffusers folder's transformer; if it is stopped, --resume goes on.",
    members={name: partial(command_of, name, build) for name, build in found().items()},
    what="recipe",
    other=pipeline_command_of,
)
