"""A model of prompts, trained by `ditkit train emoji-text`: does it draw what it is asked?

    ditkit train emoji-text --out RUN --sheet-every 0
    python benchmarks/emoji_text.py --model RUN/model

Names that training never saw are drawn and looked for among their real pictures (retrieval), and ten prompts that are
in no set are drawn for people to look at, as docs/emoji/prompts.png.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro

from common import record, show

PROMPTS = (
    *(
        "a red apple",
        "yellow star",
        "green car",
        "purple heart",
        "blue fish",
        "black cat face",
        "slice of pizza",
    ),
    *("house with tree", "smiling face with sunglasses", "flag"),
)
SHEET = Path(__file__).parents[1] / "docs" / "emoji" / "prompts.png"


@dataclass(frozen=True)
class Arguments:
    """What is drawn.

    Args:
        model: folder of the trained model. count: pictures of held-out names. steps, guidance: of sampling.
    """

    model: Path
    count: int = 96
    steps: int = 20
    guidance: float = 4.0


def main(arguments: Arguments) -> None:
    sampling = ["--steps", str(arguments.steps), "--guidance", str(arguments.guidance)]
    with TemporaryDirectory() as folder:
        prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
        ditkit("generate", arguments.model, *prompts, "--seeds", "0..2", *sampling, "--out", folder)
        shutil.copy(Path(folder) / "sheet.png", SHEET)
        held_out = ["--data", "emoji", "--option", "split=test", "--count", arguments.count]
        ditkit("evaluate", arguments.model, *held_out, *sampling, "--out", folder)
        found = json.loads((Path(folder) / "evaluation.json").read_text(encoding="utf8"))
    names = ("n_fake", "n_real", "kid_mean", "kid_std", "precision", "recall")
    row = {"steps": arguments.steps, "guidance": arguments.guidance, **{name: found[name] for name in names}}
    rows = [row | {f"retrieval_{name}": value for name, value in found["retrieval"].items()}]
    show("Prompts", rows)
    record("emoji_text", rows)


def ditkit(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "ditkit", *map(str, words)], check=True)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
