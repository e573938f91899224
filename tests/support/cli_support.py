"""`ditkit WORDS` in this process: its exit code, what it prints, its one line of refusal; and photos for it."""

from __future__ import annotations

import math
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from PIL import Image

from ditkit.cli.main import main

Capture = pytest.CaptureFixture[str]


def exit_code(*words: object) -> int:
    return main([str(word) for word in words])


def output(capsys: Capture, *words: object) -> str:
    """What `ditkit WORDS` prints on stdout; it must succeed, and be silent on stderr however slow the machine is."""
    with patch("ditkit.core.terminal.LINE_SECONDS", math.inf):
        code = exit_code(*words)
    said = capsys.readouterr()
    assert code == 0 and said.err == "", said
    return said.out


def complaint(capsys: Capture, *words: object) -> str:
    """The one line that `ditkit WORDS` prints on stderr."""
    code = exit_code(*words)
    said = capsys.readouterr()
    assert code == 2 and said.out == "", said
    (line,) = said.err.splitlines()
    assert line.startswith("ditkit: error: ")
    return line


def save_photos(folder: Path) -> Path:
    """A folder of class folders, three noisy pictures in each."""
    generator = torch.Generator().manual_seed(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            pixels = torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{i}.png")
    return folder
