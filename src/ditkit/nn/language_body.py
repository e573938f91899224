"""A pretrained language model's first blocks as weights under our names, and GPT-2's names for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from ditkit.nn.causal import Shape


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


INSIDE_GPT2: Mapping[str, str] = {
    ".ln_1.": ".attn_norm.",
    ".ln_2.": ".mlp_norm.",
    ".attn.c_attn.": ".attn.qkv.",
    ".attn.c_proj.": ".attn.out.",
    ".mlp.c_fc.": ".mlp.inner.",
    ".mlp.c_proj.": ".mlp.out.",
}
STARTS_OF_GPT2: Mapping[str, str] = {
    "h.": "blocks.",
    "wte.": "words.",
    "wpe.": "positions.",
    "ln_f.": "norm.",
}
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


def gpt2_state(state: Mapping[str, Tensor], depth: int, words: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield what the first blocks need under our names, of the words only some."""
    for theirs, value in state.items():
        name = of_gpt2(theirs)
        if name == "words.weight":
            yield name, value[list(words)]
        elif name and not (name.startswith("blocks.") and int(name.split(".")[1]) >= depth):
            yield name, turned(name, value)
