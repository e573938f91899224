"""`ditkit train FOLDER`: the transformer of a diffusers pipeline, trained on latents and embedded prompts."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import tyro

from ditkit.api.compress import as_transforms
from ditkit.api.train_pipeline import SETTINGS, PipelineTraining, describe, run_training
from ditkit.cli.flags import flags_of, with_flags
from ditkit.cli.options import Policies, is_main_process, policies_of, writable
from ditkit.cli.parsing import Command
from ditkit.cli.train_flags import Groups, Terms, Transforms, groups_of
from ditkit.core.checkpoint import read_json
from ditkit.core.errors import ConfigError
from ditkit.core.files import kind_of
from ditkit.core.model import CONFIG
from ditkit.core.spec import components
from ditkit.train.objective import Term
from ditkit.train.timesteps import LogitNormal, Shifted, Uniform

TIMES: dict[str, Uniform | LogitNormal] = {"uniform": Uniform(), "logit-normal": LogitNormal()}
Fraction = Annotated[float | None, tyro.conf.arg(metavar="FLOAT")]
Times = Annotated[str | None, tyro.conf.arg(metavar="|".join(TIMES))]
LEFT = ("model", "losses.jsonl", "tensorboard", "state.safetensors")
"""The files that a run may leave in its folder."""


def is_folder(word: str) -> bool:
    """Return whether a word of the command line is meant as a folder."""
    return "/" in word or kind_of(Path(word).expanduser()) == "folder"


def command_of(source: str) -> Command | None:
    """`ditkit train FOLDER`; nothing where the word is no folder."""
    if not is_folder(source):
        return None
    run_flags = flags_of(SETTINGS)

    def run(
        *,
        data: Path,
        out: Path = Path("runs/pipeline"),
        transform: Transforms = (),
        policy: Policies = (),
        term: Terms = (),
        times: Times = None,
        shift: Fraction = None,
        dropout: Fraction = None,
        guidance: float = 1.0,
        group: Groups = (),
        settings: Any = run_flags,
        resume: bool = False,
        dry_run: bool = False,
    ) -> None:
        chosen = with_flags(SETTINGS, settings, groups=groups_of(group, SETTINGS.groups))
        training = PipelineTraining(
            source=source,
            data=data,
            transforms=as_transforms(transform) if transform else (),
            policies=policies_of(policy),
            terms=components("--term", Term, term),  # type: ignore[type-abstract]
            timesteps=timesteps_of(times, shift),
            settings=chosen,
            dropout=dropout,
            guidance=guidance,
        )
        if dry_run:
            print(describe(training))
            return
        with writable(out):
            run_training(training, out, resume)
        if is_main_process():
            print(f"wrote {out}: {', '.join(name for name in LEFT if (out / name).exists())}; {opening(out)}")

    flattened: Any = Annotated[type(run_flags), tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands]
    run.__annotations__["settings"] = flattened
    run.__doc__ = f"""Train the transformer of a diffusers pipeline on latents and embedded prompts.

    What diffusers' own class can open is saved as its folder; LoRA that is not merged, and policies, as one that
    ditkit.load opens. docs/guides/train_a_pipeline.md says what the file of --data holds.

    Examples:
        ditkit train {source} --data latents.safetensors --dry-run
        ditkit train {source} --data latents.safetensors --transform lora:rank=16 --learning-rate 1e-4 --out runs/mine
        ditkit train {source} --data latents.safetensors --transform kept:blocks=0+2+4 --term maskeddistillation

    Writes into the folder of --out:
        model/               the averaged weights
        losses.jsonl         a line a step
        state.safetensors    what --resume goes on from

    Args:
        data: One safetensors file: latents, and embedded prompts under the names of the pipeline's arguments.
        out: Folder of the run.
        transform: Change the transformer first, as ditkit compress does: lora:rank=8, kept:blocks=0+2. Repeat it for
            several.
        policy: Train under a policy, such as taskrouting:path=linear. Repeat it for several.
        term: A part of the loss, such as regression:weight=0.1 or maskeddistillation. Repeat it for several; these
            replace the default: regression, and variationalbound for a network that learns its variance.
        times: Distribution of the noise-times. Default: logit-normal for flow matching, uniform for DDPM.
        shift: Shift of these times towards noise; 1 is none. Default: as the scheduler shifts its steps.
        dropout: Share of samples whose prompt or class is replaced by the unconditional one. Default: 0.1, or 0 where
            the file has no negative_prompt_embeds.
        guidance: Guidance scale that a guidance-distilled network gets as its input.
        group: A part of the weights with a learning rate of its own, such as lora:rate=10. Repeat it for several.
        resume: Go on where the run in --out was stopped.
        dry_run: Print the settings and the parameters, and stop.
    """.replace("\n    ", "\n")
    return run


def timesteps_of(times: str | None, shift: float | None) -> Any:
    """Return the distribution that both flags describe; None where neither is given.

    Raises:
        ConfigError: there is no such distribution, or a shift is not positive.
    """
    if times is not None and times not in TIMES:
        raise ConfigError(f"--times {times}, expected one of {', '.join(TIMES)}")
    if shift is None:
        return None if times is None else TIMES[times]
    inner = TIMES[times or "logit-normal"]
    return inner if shift == 1 else Shifted(shift, inner)


def opening(out: Path) -> str:
    """Say how the result is opened."""
    content = read_json(out / "model" / CONFIG)
    if "_class_name" in content:
        return f"open it with diffusers: {content['_class_name']}.from_pretrained({str(out / 'model')!r})"
    merge = shlex.join(["ditkit", "compress", str(out / "model"), "merged", "--out", str(out / "merged")])
    wanted = any(one.get("name") == "LoRA" for one in content.get("transforms", []))
    after = f"; for plain diffusers: {merge}" if wanted and not content.get("policies") else ""
    return f"diffusers alone cannot open it; restore it with ditkit.load({str(out / 'model')!r}).transformer{after}"
