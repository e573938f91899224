"""The nine layouts of PredFormer against yyyujintang/PredFormer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

import formula
from ditkit.models.predformer import PredFormer, PredFormerConfig, published_layout
from golden_support import Case, assert_golden, cases, float64, read

SYSTEM = "40-predformer"
IN_FLOAT32 = 1e-5
"""The published angles of positions are taken in float32."""
STAGES = {
    "Full": ("space_temporal",),
    "Fac-S-T": ("space", "temporal"),
    "Fac-T-S": ("temporal", "space"),
    "Binary-ST": ("st_space", "st_temporal"),
    "Binary-TS": ("ts_temporal", "ts_space"),
    "Triplet-STS": ("space_transformer_first", "temporal", "space_transformer_second"),
    "Triplet-TST": ("temporal_transformer_first", "space", "temporal_transformer_second"),
    "Quadruplet-TSST": ("ts_temporal", "ts_space", "st_space", "st_temporal"),
    "Quadruplet-STTS": ("st_space", "st_temporal", "ts_temporal", "ts_space"),
}
"""The published names of a layer's stages, in the order in which they run."""
NAMES = {
    "0.norm": "attn_norm", "0.fn.to_qkv": "attn.qkv", "0.fn.to_out.0": "attn.out",
    "1.norm": "mlp_norm", "1.fn.fc1_g": "mlp.gate", "1.fn.fc1_x": "mlp.value", "1.fn.fc2": "mlp.out",
}  # fmt: skip
"""Published layers of a block, and ours."""


def variant(case: Case) -> str:
    return case["name"].split(",")[0]


def stages(name: str, constructor: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Yield each stage's published name, and how many blocks it has."""
    depth, count = constructor["depth"], constructor["Ndepth"]
    layered = name.split("-", maxsplit=1)[0] not in ("Full", "Fac")
    for i in range(count if layered else 1):
        for stage in STAGES[name]:
            whole = stage if "transformer" in stage else f"{stage}_transformer"
            yield (f"blocks.{i}.{whole}", depth) if layered else (whole, count)


def state(name: str, constructor: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the formula's weights of the published names, under ours."""
    c = constructor
    width, hidden, pixels = c["dim"], c["dim"] * c["scale_dim"], c["num_channels"] * c["patch_size"] ** 2
    shapes = {
        "attn_norm": (width,), "attn.qkv": (3 * width, width), "attn.out": (width, width), "mlp_norm": (width,),
        "mlp.gate": (hidden, width), "mlp.value": (hidden, width), "mlp.out": (width, hidden),
    }  # fmt: skip
    found: dict[str, Tensor] = {}

    def load(theirs: str, ours: str, shape: tuple[int, ...]) -> None:
        for kind, size in (("weight", shape), ("bias", shape[:1])):
            if (ours.endswith("attn.qkv"), kind) != (True, "bias"):
                found[f"{ours}.{kind}"] = formula.weight(f"{theirs}.{kind}", size)

    load("to_patch_embedding.1", "embed", (width, pixels))
    load("mlp_head.0", "norm", (width,))
    load("mlp_head.1", "out", (pixels, width))
    block = 0
    for stage, depth in stages(name, c):
        for i in range(depth):
            for theirs, ours in NAMES.items():
                load(f"{stage}.layers.{i}.{theirs}", f"blocks.{block}.{ours}", shapes[ours])
            block += 1
        load(f"{stage}.norm", f"blocks.{block - 1}.close", (width,))
    # at the start a token's channels come after its pixels in theirs, before them in ours; at the end the other way
    channels = c["num_channels"]
    found["embed.weight"] = found["embed.weight"].unflatten(1, (-1, channels)).transpose(1, 2).flatten(1)
    for kind in ("weight", "bias"):
        rows = found[f"out.{kind}"].unflatten(0, (channels, -1))
        found[f"out.{kind}"] = rows.transpose(0, 1).flatten(0, 1)
    return found


def predicted(case: Case) -> Tensor:
    c, name = case["constructor"], variant(case)
    config = PredFormerConfig(
        channels=c["num_channels"], frames=c["pre_seq"], size=(c["height"], c["width"]), patch=c["patch_size"],
        width=c["dim"], heads=c["heads"], hidden=c["dim"] * c["scale_dim"], layout=published_layout(name, 12),
    )  # fmt: skip
    with float64():
        model = PredFormer.holding(config, state(name, c), SYSTEM).eval()
    ((named, shape),) = case["inputs"].items()
    x = formula.tensor(re.split(" ", named)[0], shape)
    with torch.no_grad():
        return model(x.transpose(1, 2)).transpose(1, 2)


FAULTY = "Fac-S-T, 6 layers an axis group"
"""Its published head reads tokens in the wrong order; the row's first deviation."""


@cases(SYSTEM, lambda case: case["name"] != FAULTY)
def test_layouts(case: Case) -> None:
    assert_golden(predicted(case), case["results"]["output"], IN_FLOAT32)


def test_space_before_time_is_the_repaired_code() -> None:
    case = read(SYSTEM)[FAULTY]
    out = predicted(case)
    assert_golden(out, case["results"]["output, token order mended before the head"], IN_FLOAT32)
    with pytest.raises(AssertionError):
        assert_golden(out, case["results"]["output"], IN_FLOAT32)
