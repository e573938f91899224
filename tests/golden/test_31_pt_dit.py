"""PT-DiT against Ascend/MindSpeed-MM's PTDiTDiffuser, on weights by formula under the published names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import formula
from ditkit.core.cond import Cond
from ditkit.core.grid import Grid
from ditkit.core.model import parameter_count
from ditkit.models.pt_dit import FLOW, PTDiT, PTDiTConfig, positions
from ditkit.nn.proxies import members
from ditkit.nn.window_cuts import cut_windows, join_windows, seam_mask
from golden_support import assert_golden, float64, read
from test_14_dico import exact_sinusoid

CASES = read("31-pt-dit")
FAULTY = "image-mixed-times"
IN_FLOAT32 = 1e-6
"""The published sinusoids were widened to float64; ours of time and place are float32."""


def attention_shapes(width: int, name: str) -> dict[str, tuple[int, ...]]:
    layers = [f"{name}.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")]
    return {f"{layer}.weight": (width, width) for layer in layers} | {
        f"{layer}.bias": (width,) for layer in layers
    }


def published_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a published PTDiTDiffuser by name, without its table of positions."""
    D, p = c["num_heads"] * c["head_dim"], c["patch_size"]
    layers: dict[str, tuple[int, ...]] = {
        "pos_embed.proj": (D, c["in_channels"], p, p),
        "adaln_single.emb.timestep_embedder.linear_1": (D, 256),
        "adaln_single.emb.timestep_embedder.linear_2": (D, D),
        "adaln_single.linear": (6 * D, D),
        "caption_projection.linear_1": (D, c["caption_channels"]),
        "caption_projection.linear_2": (D, D),
        "proj_out": (p * p * c["out_channels"], D),
    }
    shapes: dict[str, tuple[int, ...]] = {"scale_shift_table": (2, D)}
    for i in range(c["num_layers"]):
        at = f"transformer_blocks.{i}."
        layers |= {
            f"{at}ff.net.0.proj": (4 * D, D),
            f"{at}ff.net.2": (D, 4 * D),
            f"{at}linear_1_visual": (D, D),
            f"{at}linear_2": (D, D),
        }
        shapes |= {f"{at}scale_shift_table": (6, D), f"{at}proxy_scale_shift_table": (3, D)}
        for name in ("proxy_attn1", "attn1", "pvisual_attn2", "attn2", "attn3"):
            shapes |= attention_shapes(D, at + name)
    shapes |= {f"{name}.weight": shape for name, shape in layers.items()}
    return shapes | {f"{name}.bias": shape[:1] for name, shape in layers.items()}


def published(case: dict[str, Any]) -> PTDiT:
    c = case["constructor"]["PTDiTDiffuser"]
    window = tuple(c["compress_ratios"])
    frames, *proxies = (n // m for n, m in zip(window, c["proxy_compress_ratios"], strict=True))
    assert frames == 1
    config = PTDiTConfig(
        size=c["sample_size"],
        patch=c["patch_size"],
        channels=c["in_channels"],
        width=c["num_heads"] * c["head_dim"],
        depth=c["num_layers"],
        heads=c["num_heads"],
        window=window,
        proxies=tuple(proxies),
        classes=0,
        text_width=c["caption_channels"],
        convention=FLOW,
    )
    state = {"pos_embed.pos_embed": torch.zeros(1), **formula.weights(published_shapes(c))}
    with float64():
        return PTDiT.from_original(state, config).eval()


def inputs(case: dict[str, Any]) -> tuple[Tensor, Tensor, Cond]:
    """Return x, [B, C, T, H, W], the times and the text."""
    x, text = (formula.tensor(name, case["inputs"][name][1]) for name in ("x", "text"))
    mask = torch.tensor(case["inputs"]["mask"]).bool()
    return x, torch.tensor(case["inputs"]["t"]).double(), Cond(text=text[:, 0], text_mask=mask)


def exact_axis(count: int, width: int, device: Any = None, step: float = 1.0) -> Tensor:
    frequency = 10_000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angle = torch.arange(count)[:, None] * step * frequency
    return torch.cat([angle.sin(), angle.cos()], -1)


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditkit.nn.embeddings.sinusoid", exact_sinusoid)
    monkeypatch.setattr("ditkit.models.pt_dit.sincos_axis", exact_axis)


def called(model: PTDiT, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """Return what a model says, [B, C, T, H, W]."""
    with torch.no_grad():
        return model(x[:, :, 0], t, cond)[:, :, None]


def taps(model: PTDiT, given: tuple[Tensor, Tensor, Cond]) -> dict[str, Tensor]:
    """Return what a model says and what its first block's attentions do, in the published order of rows."""
    block, outs = model.blocks[0], {}
    grid = Grid.of(model.config.sides, model.config.patch)
    window = model.config.window_of(grid)

    def noted(name: str) -> Any:
        def hook(*passed: Any) -> None:
            outs[name] = passed[-1]

        return hook

    attentions = {"proxy_self": "proxy_attn", "proxy_cross": "inject"}
    attentions |= {"window": "attn", "shifted_window": "shifted_attn"}
    hooks = [
        getattr(block, ours).register_forward_hook(noted(f"block0_{theirs}_attention"))
        for theirs, ours in attentions.items()
    ]
    hooks.append(block.register_forward_hook(noted("block0_output_windows_tokens")))
    outs["output"] = called(model, *given)
    for hook in hooks:
        hook.remove()
    for name, last in (("block0_proxy_cross_attention", 1), ("block0_output_windows_tokens", 0)):
        outs[name] = cut_windows(outs[name], grid, window).flatten(last, last + 1)
    return outs


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", ["image-equal-times", "several-proxies"])
def test_the_forward_pass_and_the_attentions_of_a_block(name: str) -> None:
    case = CASES[name]
    model, expected = published(case), dict(case["expect"])
    assert parameter_count(model) == expected.pop("parameters")
    found = taps(model, inputs(case))
    assert found.keys() == expected.keys()
    for tap, value in found.items():
        assert_golden(value, expected[tap])


def test_the_forward_pass_with_sinusoids_in_float32() -> None:
    case = CASES["image-equal-times"]
    assert_golden(called(published(case), *inputs(case)), case["expect"]["output"], IN_FLOAT32)


@pytest.mark.usefixtures("in_float64")
def test_a_sample_of_mixed_times_is_the_one_that_runs_alone() -> None:
    """The published code lays times out by window, then sample: its numbers agree only before they are used."""
    case = CASES[FAULTY]
    given = inputs(case)
    found, alone = taps(published(case), given), CASES["single-sample"]
    assert (alone["inputs"]["t"], alone["inputs"]["mask"]) == ([900], case["inputs"]["mask"][1])
    assert_golden(found["output"][1:], alone["expect"]["output"])
    for name in ("block0_proxy_self_attention", "block0_proxy_cross_attention"):
        assert_golden(found.pop(name), case["expect"][name])
    for name, value in found.items():
        with pytest.raises(AssertionError):
            assert_golden(value, case["expect"][name], 1e-5)


def test_windows_shifts_seams_and_proxies() -> None:
    expected, grid, window = CASES["windows"]["expect"], Grid(1, 8, 8), (1, 4, 4)
    token = (100 * torch.arange(8)[:, None] + torch.arange(8)).reshape(1, -1, 1)
    windows = cut_windows(token, grid, window)
    shifted = cut_windows(token, grid, window, (0, 2, 2))
    assert windows[0, :, :, 0].tolist() == expected["window_tokens"]
    assert shifted[0, :, :, 0].tolist() == expected["shifted_window_tokens"]
    restored = torch.equal(join_windows(shifted, grid, window, (0, 2, 2)), token)
    assert restored == expected["inverse_shift_restores"]
    blocked = (~seam_mask(grid, window, (0, 2, 2))).sum((1, 2)).tolist()
    assert blocked == expected["blocked_pairs_per_window"]
    _, *proxies = expected["proxies_per_window_axis"]
    own = members(windows, window, tuple(proxies))[0, 0, :, :, 0]  # rows of each proxy of the first window
    assert own.T.tolist() == expected["tokens_averaged_by_proxy"]
    first = own[0].tolist()
    assert [4 * (n // 100) + n % 100 for n in first] == expected["first_mode_flat_index_by_proxy"]


def test_positions_and_the_swapped_sides_of_the_published_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditkit.models.pt_dit.sincos_axis", exact_axis)
    expected = CASES["positions"]["expect"]
    square = positions(Grid(2, 3, 3), 16, 1.0)
    assert square.sum().item() == pytest.approx(expected["sum"], rel=1e-12)
    picked = torch.tensor(expected["square_3x3_frame1_tokens_1_and_3"], dtype=torch.float64)
    assert torch.allclose(square[9:][[1, 3]], picked, atol=1e-14)
    # of 2 rows and 3 columns the published table has, in this order, the places of 3 rows and 2 columns
    picked = torch.tensor(expected["height2_width3_tokens_1_2"], dtype=torch.float64)
    assert torch.allclose(positions(Grid(2, 3, 2), 16, 1.0)[[1, 2]], picked, atol=1e-14)
    ours = positions(Grid(1, 2, 3), 16, 1.0)
    assert torch.equal(ours[2, 4:10], exact_axis(3, 6)[2]) and torch.equal(ours[2, 10:], exact_axis(2, 6)[0])


@pytest.mark.usefixtures("in_float64")
def test_the_common_modulation() -> None:
    case = CASES["time-modulation"]
    model = published(CASES["image-equal-times"])
    with torch.no_grad():
        c, common = model.condition(torch.tensor(case["inputs"]["t"], dtype=torch.float64), Cond())
    assert_golden(c, case["expect"]["embedded"])
    assert_golden(common, case["expect"]["modulation"])


def test_parameters_of_the_released_model() -> None:
    expected = CASES["parameters"]["expect"]
    with torch.device("meta"):
        counts = {name: parameter_count(PTDiT.preset("XL", shift=name == "shifted")) for name in expected}
    assert counts == expected
