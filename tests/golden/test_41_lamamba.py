"""LaMamba-Diff against yunxiangfu2001/LaMamba-Diff, on weights by formula under the published names."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Any

import pytest
import torch
from torch import Tensor

import formula
from ditkit.core.cond import Cond
from ditkit.core.errors import CheckpointError
from ditkit.core.grid import Grid
from ditkit.core.model import parameter_count
from ditkit.core.run import Run
from ditkit.models.lamamba import STAGES, LaMamba, LaMambaBlock, LaMambaConfig, renamed
from ditkit.nn.scan import Paths, SelectiveScan2D, snake_paths
from ditkit.nn.stages import ExpandPatches, MergePatches
from ditkit.nn.windows import cut_windows, relative_places, seam_mask
from golden_support import assert_golden, float64, read
from test_14_dico import exact_sinusoid

CASES = read("41-lamamba")
ORIGINAL_LEVELS = (*(f"layers.{i}" for i in range(4)), "mid_layer", *(f"layers_up.{i}" for i in range(4)))


def scan_shapes(width: int) -> dict[str, tuple[int, ...]]:
    inner, rank = 2 * width, ceil(width / 16)
    return {
        "x_proj_weight": (4, rank + 2, inner),
        "dt_projs_weight": (4, inner, rank),
        "dt_projs_bias": (4, inner),
        "A_logs": (4 * inner, 1),
        "Ds": (4 * inner,),
        "out_norm.weight": (inner,),
        "out_norm.bias": (inner,),
        "in_proj.weight": (2 * inner, width),
        "conv2d.weight": (inner, 1, 3, 3),
        "out_proj.weight": (width, inner),
    }


def block_shapes(
    width: int, told: int, projects: bool, window: int, heads: int
) -> dict[str, tuple[int, ...]]:
    layers = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (4 * width, width),
        "mlp.fc2": (width, 4 * width),
        "adaLN_modulation.1": (9 * width, width),
        **({"condition_projection": (width, told)} if projects else {}),
    }
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    shapes |= {
        f"{name}.{part}": (width,) for name in ("norm", "norm_swin", "norm2") for part in ("weight", "bias")
    }
    shapes |= {f"op.{name}": shape for name, shape in scan_shapes(width).items()}
    return shapes | {"attn.relative_position_bias_table": ((2 * window - 1) ** 2, heads)}


def published_shapes(c: LaMambaConfig) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a published LaMambaDiff by name, without its tables of masks and offsets."""
    D, told = c.width, 4 * c.width
    layers: dict[str, tuple[int, ...]] = {
        "patch_embed.proj": (D, c.channels, c.patch, c.patch),
        "t_embedder.mlp.0": (told, 256),
        "t_embedder.mlp.2": (told, told),
        "final_condition_projection": (D, told),
        "final_adaLN_modulation.1": (2 * D, D),
        "final_linear": (2 * c.channels, D),
    }
    norms = {"patch_embed.norm": D, "final_up.norm": D}
    shapes = {
        "pos_embed": (1, c.sides[0], c.sides[0], D),
        "y_embedder.embedding_table.weight": (c.classes + 1, told),
        "final_up.expand.weight": (c.patch**2 * D, D),
    }
    for i, width in enumerate((D, 2 * D)):
        shapes[f"layers.{i}.downsample.reduction.weight"] = (2 * width, 4 * width)
        norms[f"layers.{i}.downsample.norm"] = 4 * width
    for i, width in ((2, 4 * D), (3, 2 * D)):
        shapes[f"layers_up.{i}.upsample.expand.weight"] = (2 * width, width)
        norms[f"layers_up.{i}.upsample.norm"] = width // 2
    shapes |= {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    shapes |= {f"{name}.{part}": (width,) for name, width in norms.items() for part in ("weight", "bias")}
    for i, (level, width, blocks) in enumerate(zip(ORIGINAL_LEVELS, c.widths, c.blocks, strict=True)):
        of_block = block_shapes(
            width, told, i > 4 or width != told, min(c.window, c.sides[STAGES[i]]), c.heads
        )
        for j in range(blocks):
            shapes |= {f"{level}.blocks.{j}.{name}": shape for name, shape in of_block.items()}
    return shapes


def with_tables(state: dict[str, Tensor], c: LaMambaConfig) -> dict[str, Tensor]:
    """Add the buffers that a published checkpoint has as well."""
    tables = {}
    for i, level in enumerate(ORIGINAL_LEVELS):
        side = c.sides[STAGES[i]]
        window = min(c.window, side)
        for j in range(c.blocks[i]):
            tables[f"{level}.blocks.{j}.attn.relative_position_index"] = relative_places(window)
            if j % 2 and side > window:
                seen = seam_mask(Grid(1, side, side), window, c.window // 2)
                tables[f"{level}.blocks.{j}.attn_mask"] = -100.0 * ~seen
    return state | tables


def config_of(case: dict[str, Any]) -> LaMambaConfig:
    c = case["constructor"]["LaMambaDiff"]
    return LaMambaConfig(
        size=c["in_resolution"],
        patch=c["patch_size"],
        channels=c["in_chans"],
        width=c["dims"],
        depth=tuple(c["depths"]),
        middle=c["bottleneck_depth"],
        heads=c["num_heads"][0],
        window=c["window_size"],
        classes=c["num_classes"],
    )


def test_scan_order() -> None:
    expected = CASES["scan-order"]["expect"]
    paths = snake_paths(Grid(1, 4, 4))
    assert paths.tolist() == expected["scan_1_to_4"]
    assert paths.argsort(1).tolist() == expected["inverse_1_to_4"]


def test_the_scan_and_its_names() -> None:
    case = CASES["ss2d"]
    expected, shapes = case["expect"], scan_shapes(8)
    assert {name: list(shape) for name, shape in shapes.items()} == expected["names"]
    with float64():
        scan = SelectiveScan2D(8)
    state = renamed(
        {f"layers.0.blocks.0.op.{name}": formula.weight(name, shape) for name, shape in shapes.items()}
    )
    scan.load_state_dict({name.removeprefix("levels.0.0.scan."): value for name, value in state.items()})
    grid = Grid(1, 6, 6)
    x = formula.tensor("x", case["inputs"]["x"][1])
    with torch.no_grad():
        out = scan(x.flatten(1, 2), grid)
    assert_golden(out.unflatten(1, (6, 6)), expected["output"])
    flat = formula.tensor("flat", case["inputs"]["flat"][1]).flatten(2)
    assert_golden(flat[..., snake_paths(grid)].transpose(1, 2), expected["scan_in_first_rows"])


@pytest.mark.parametrize("name", ["block-shifted", "block-clamped"])
def test_a_block_and_its_attention(name: str) -> None:
    case = CASES[name]
    given, expected = case["constructor"]["LaMambaBlock_conditioned"], case["expect"]
    width, told, side = given["hidden_dim"], given["condition_dim"], given["input_resolution"]
    config = replace(
        LaMambaConfig.tiny(), size=4 * side, heads=given["num_heads"], window=given["window_size"]
    )
    with float64():
        block = LaMambaBlock(width, told, told != width, config, side, bool(given["shift_size"]))
    window = block.attn.window
    shapes = block_shapes(width, told, told != width, window, config.heads)
    state = renamed({f"layers.0.blocks.0.{key}": formula.weight(key, shape) for key, shape in shapes.items()})
    block.load_state_dict({key.removeprefix("levels.0.0."): value for key, value in state.items()})
    x, c, h = (formula.tensor(key, case["inputs"][key][1]) for key in ("x", "c", "h"))
    grid = Grid(1, side, side)
    with torch.no_grad():
        out, attended = block(x.flatten(1, 2), c, (grid, Paths.of(grid))), block.attn(h.flatten(1, 2), grid)
    assert_golden(out.unflatten(1, (side, side)), expected["output"])
    assert_golden(attended.unflatten(1, (side, side)), expected["attention_branch_of_h"])
    assert (window, block.attn.shift) == (expected["effective_window"], expected["effective_shift"])
    tokens = cut_windows(torch.arange(side**2).view(1, -1, 1), grid, window, block.attn.shift)[0, :, :, 0]
    assert [tokens[0].tolist(), tokens[-1].tolist()] == expected["tokens_of_first_and_last_window"]
    if "mask_shape" in expected:
        seen = seam_mask(grid, window, block.attn.shift)
        assert list(seen.shape) == expected["mask_shape"]
        assert (~seen).sum((1, 2)).tolist() == expected["blocked_pairs_per_window"]


@pytest.mark.parametrize(
    ("layer", "key", "name"),
    [
        (MergePatches(3, 5), "merge", "x"),
        (ExpandPatches(8, 4), "expand", "y"),
        (ExpandPatches(3, 3, 2), "final_expand", "z"),
    ],
    ids=["merge", "expand", "final"],
)
def test_resampling(layer: MergePatches | ExpandPatches, key: str, name: str) -> None:
    case, layer = CASES["resample"], layer.double()
    inner = "outer" if key == "merge" else "inner"
    theirs = {"merge": "reduction.weight"}.get(key, "expand.weight")
    names = {f"{inner}.weight": theirs, "norm.weight": "norm.weight", "norm.bias": "norm.bias"}
    own = layer.state_dict()
    layer.load_state_dict({k: formula.weight(names[k], tuple(v.shape)) for k, v in own.items()})
    shape = case["inputs"][name][1]
    expected = case["expect"][key]
    with torch.no_grad():
        out = layer(formula.tensor(name, shape).flatten(1, 2), Grid(1, *shape[1:3]))
    assert_golden(out.unflatten(1, expected["shape"][1:3]), expected)


def test_the_four_of_a_merged_patch_stand_column_by_column() -> None:
    merge = MergePatches(1, 4)
    merge.norm, merge.outer = torch.nn.Identity(), torch.nn.Identity()
    first = merge(torch.arange(16.0).view(1, 16, 1), Grid(1, 4, 4))[0, 0]
    order = [divmod(int(place), 4) for place in first]
    assert [list(place) for place in order] == CASES["resample"]["expect"]["merged_order_of_row_col"]


def test_the_forward_pass_and_what_flows_between_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditkit.nn.embeddings.sinusoid", exact_sinusoid)
    case = CASES["model"]
    config, expected = config_of(case), case["expect"]
    state = with_tables(formula.weights(published_shapes(config)), config)
    with float64():
        model = LaMamba.from_original(state, config).eval()
    assert parameter_count(model) == expected["parameters"]
    assert list(config.blocks) == expected["blocks_per_stage"]
    outs: dict[str, Tensor] = {}

    def noted(i: int) -> Any:
        def handler(fn: Any, x: Tensor, *args: Any) -> Any:
            out = fn(x, *args)
            side = config.sides[STAGES[i]]
            name = f"skip_{i}" if i < 4 else "mid" if i == 4 else f"decoder_{i - 5}"
            outs[name] = out.unflatten(1, (side, side))
            return out

        return handler

    run = Run({f"levels.{i}": noted(i) for i in range(9)})
    x, label = formula.tensor("x", case["inputs"]["x"][1]), torch.tensor(case["inputs"]["y"])
    with torch.no_grad():
        out = model(x, torch.tensor(case["inputs"]["t"]).double(), Cond(label=label), run)
    assert_golden(out, expected["output"])
    assert outs.keys() == expected["taps"].keys()
    for name, tap in expected["taps"].items():
        assert_golden(outs[name], tap)


def test_a_fresh_network() -> None:
    expected = CASES["fresh"]["expect"]
    model = LaMamba(config_of(CASES["fresh"]))
    assert bool(model.head.out.weight.any()) != expected["last_linear_is_zero"]
    assert bool(model.head.out.bias.any()) != expected["last_linear_bias_is_zero"]
    gates = [v for name, v in model.named_parameters() if "modulation" in name]
    assert len(gates) == 2 * 23 and expected["adaln_all_zero"] and not any(v.any() for v in gates)
    scans = [part for part in model.modules() if isinstance(part, SelectiveScan2D)]
    for scan in scans:
        assert bool((-scan.log_decay.exp() == expected["A"]).all() and (scan.skip == expected["D"]).all())
    assert model.positions.requires_grad == expected["position_table_trainable"]


@pytest.mark.parametrize("side", ["256", "512"])
def test_parameters_of_xl(side: str) -> None:
    with torch.device("meta"):
        model = LaMamba.preset("XL", size=int(side) // 8)
    assert parameter_count(model) == CASES["parameters"]["expect"][side]


def test_a_checkpoint_of_another_resolution_is_refused_and_told_how() -> None:
    config = config_of(CASES["model"])
    state = with_tables(formula.weights(published_shapes(config)), config)
    with pytest.raises(
        CheckpointError, match=r"made for size=16 .* expected size=32; load it with size=16, then"
    ) as caught:
        LaMamba.from_original(state, replace(config, size=32))
    assert "\n" not in str(caught.value)
