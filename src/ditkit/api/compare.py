"""The exact sampler and any list of policies on the same seeds: what each costs, how far each is off."""

from __future__ import annotations

import platform
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ditkit.bench.bench import EXACT, Bench, Method
from ditkit.bench.memory import Isolated
from ditkit.bench.rows import titles
from ditkit.core.cond import Cond
from ditkit.core.config import LARGEST, MOST_STEPS, integer
from ditkit.core.errors import ConfigError
from ditkit.core.labels import class_names
from ditkit.core.model import Denoiser, parameter_count
from ditkit.core.policy import Policy
from ditkit.core.spec import brief
from ditkit.core.task import Progress, Task, generating
from ditkit.metrics.error import generated_mask
from ditkit.report.report import Report
from ditkit.sample.denoiser import placement
from ditkit.sample.sampler import Sampler, Sampling, check_given

CONVERGED = 10  # times the steps: an order-1 solver is then ten times nearer to its limit than what it judges


def compare(
    model: Denoiser,
    *,
    label: int | str | Sequence[int | str] | None = None,
    prompt: str | Sequence[str] | None = None,
    cond: Cond = Cond(),
    shape: Sequence[int] | None = None,
    sampling: Sampling = Sampling(),
    converged_steps: int | None = None,
    rounds: int = 3,
    memory: bool = True,
    real: Tensor | None = None,
    control: bool = True,
    controls_as_rows: bool = False,
    rivals: Mapping[str, Denoiser] = MappingProxyType({}),
    progress: Progress | bool = True,
    **changes: Any,
) -> Report:
    """Draw the same seeds exactly, under each policy of `sampling` alone and by rivals; report cost and error.

    A PSNR is that of the squared error averaged over all samples (not the mean of each sample's PSNR), of
    samples as the sampler returns them, not clipped. Of clips that are given in part, only what was generated
    counts. A solver that draws noise gives other samples in another number of steps: there the converged and
    control columns say little.

    Args:
        model: in eval mode, on the device that is to be measured.
        label: a class by name or index, or one a seed; by default the seeds are spread over the classes.
        prompt: a text, or one a seed, for a model that takes one.
        cond: further conditioning of each sample, in the order of the seeds, such as given frames and their mask.
        shape: of one sample; by default that of the given content, or the model's.
        sampling, changes: the settings, and words of `Sampling` that differ, such as `policies=[...], seeds=range(16)`;
            each policy is a row.
        converged_steps: of the exact run that stands for convergence; by default 10 times `steps`.
        rounds: timed passes over all seeds. One pass before them counts MACs, and warms up.
        memory: measure peak memory, which takes a process for each row.
        real: pictures [N, 1 or 3, H, W] in [-1, 1], which every row's distribution is compared with, of a
            model that draws pictures.
        control: for each policy, the exact sampler with as many steps as cost the same MACs.
        controls_as_rows: also rows for the exact sampler with as many steps as each policy computed in full.
        rivals: other models by the names of their rows, such as what pruning made of this one: drawn exactly, under
            their own inherent policies, and held against the exact run of this one.
        progress: True for a bar on a terminal, False for none; or what is called with (stage, done, total).

    Raises:
        ConfigError: a rival of other samples, classes or another path, or of the name of another row.
        ConfigError: a seed or policy given twice, an unknown label, a number out of range, a policy that does not
            fit the model or `max_bytes`, or (with `memory`) something that cannot be described to another process.
        ConfigError, ShapeError: given content that cannot be completed.
        NoEffectError: no policy saved anything; where only some did not, they have no row, and `left_out` of the
            report's settings says why.
        ConflictError: as the sampler raises it.
    """
    work = Sampler.of(model, label, prompt=prompt, cond=cond, shape=shape, sampling=sampling, **changes)
    task = generating(model, "compare")
    policies, steps = work.sampling.policies, work.sampling.steps
    converged_steps = CONVERGED * steps if converged_steps is None else converged_steps
    if integer("converged_steps", converged_steps, least=1, most=MOST_STEPS) <= steps:
        raise ConfigError(f"converged_steps={converged_steps}, expected more than steps={steps}")
    integer("rounds", rounds, least=1, most=LARGEST)
    methods = [Method(EXACT, "exact", EXACT, EXACT, (), steps)]
    for policy, title in zip(policies, titles(policies), strict=True):
        work.check([policy])
        methods.append(Method(title.name, "policy", title.series, title.tag, (policy,), steps))
    methods += [rival_of(work, task, name, rival) for name, rival in rivals.items()]
    _check_names(methods)
    judge = None if real is None else task.judge(real, len(work.sampling.seeds), work.shape)

    with tempfile.TemporaryDirectory() as folder, shown(progress) as advance:
        bench = Bench(work, task, methods, advance)
        isolated = isolated_of(bench, policies, Path(folder)) if memory else {}  # refuses before any drawing
        bench.count()
        if control:
            bench.add_controls()
        if controls_as_rows:
            bench.add_control_rows()
        bench.converge(converged_steps)
        bench.time(rounds)
        if memory:
            bench.measure_memory(isolated)
    settings = settings_of(work, task, converged_steps, rounds, memory)
    if rivals:
        settings["rivals"] = {name: described(rival) for name, rival in rivals.items()}
    if bench.idle:
        settings["left_out"] = [str(error) for error in bench.idle.values()]
    pictures = {name: task.draw(samples) for name, samples in bench.samples().items()}
    return Report(bench.rows(judge), settings, pictures, task, bench.generated)


def shown(progress: Progress | bool) -> AbstractContextManager[Progress | None]:
    """Inside, what is told of the progress: a bar on a terminal, nothing, or the caller's own."""
    if isinstance(progress, bool):
        from ditkit.core.terminal import progress as bar

        return bar(lines=False) if progress else nullcontext()
    return nullcontext(progress)


def isolated_of(bench: Bench, policies: Sequence[Policy], folder: Path) -> dict[str, Isolated]:
    """Write the first model, with its policies, and each rival to `folder`, for processes of their own."""
    models = [method for method in bench.methods if method.kind in ("exact", "rival")]
    return {m.name: Isolated(bench.of(m), () if m.rival else policies, folder) for m in models}


def rival_of(work: Sampler, task: Task, name: str, rival: Denoiser) -> Method:
    """Return the row of another model.

    Raises:
        ConfigError: its samples are not comparable with those of the first.
    """
    own = generating(rival, "compare", name)
    given, wanted = (
        {
            "task": kind.name,
            "samples": list(model.signal_shape),
            "classes": class_names(model),
            "path": model.config.convention.path,
        }
        for model, kind in ((rival, own), (work.model, task))
    )
    for key in wanted:
        if given[key] != wanted[key]:
            raise ConfigError(
                f"rival {name}: {key} {given[key]!r:.80}, expected {wanted[key]!r:.80}, as the model that it is "
                "compared with"
            )
    check_given(rival, work.cond, len(work.sampling.seeds), work.shape)
    replace(work, model=rival).check(())
    return Method(name, "rival", name, name, (), work.sampling.steps, rival)


def _check_names(methods: Sequence[Method]) -> None:
    names = [method.name for method in methods]
    if repeated := [name for name in names if names.count(name) > 1 or name == "converged"]:
        raise ConfigError(f"rival {repeated[0]!r} is the name of another row, expected one of its own")


def described(model: Denoiser) -> dict[str, Any]:
    """Return a model as JSON: its class, its size, and what was done to it."""
    config = asdict(model.config)
    config.pop("class_names", None)
    return {
        "class": type(model).__name__,
        "parameters": parameter_count(model),
        "config": config,
        "history": list(model.history),
    }


def settings_of(work: Sampler, task: Task, converged_steps: int, rounds: int, memory: bool) -> dict[str, Any]:
    """Everything that the numbers depend on, JSON-able."""
    device, dtype = placement(work.model)
    generated, sampling = generated_mask(work.cond), work.sampling
    return {
        "model": described(work.model) | {"task": task.name},
        "steps": sampling.steps,
        "converged_steps": converged_steps,
        "solver": brief(sampling.solver),
        "guidance": brief(sampling.guidance),
        "seeds": list(sampling.seeds),
        "labels": list(work.labels) or None,
        **({"prompts": list(work.prompts)} if work.prompts else {}),
        "codec": type(work.model.codec).__name__,
        "shape": list(work.shape),
        **({} if generated is None else {"generated": generated.double().mean().item()}),
        "batch_size": sampling.batch_size,
        "max_bytes": sampling.max_bytes,
        "rounds": rounds,
        "memory": memory,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in ("ditkit", "torch")}
        | {"python": platform.python_version()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
