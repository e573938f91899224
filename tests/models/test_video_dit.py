"""The video DiT: full attention over a clip, what it is told, and policies at work on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.bench.macs import count_macs
from ditkit.caching.taylorseer import TaylorSeer
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError, DitkitError, ShapeError
from ditkit.core.grid import Grid
from ditkit.core.model import Model, parameter_count
from ditkit.core.policy import Policy
from ditkit.core.run import DIRECT, Run
from ditkit.core.trajectory import Trajectory
from ditkit.models.video_dit import PRESETS, VideoDiT, VideoDiTConfig
from ditkit.nn.blocks import KV, Stack
from ditkit.nn.modulation import Parts, modulate
from ditkit.nn.rotary import axial_angles, rotary_table
from ditkit.sample import ClassifierFree
from ditkit.sample import sample as draw
from models_support import perturbed
from policies_support import BandReuse, Gate, Gated, RowSelector, SelectedRows, by_row
from rig import call_at

B, S = 2, 5
PLAIN = VideoDiTConfig(frames=4, size=(8, 12), patch=(2, 2, 2), channels=2, width=32, depth=3, heads=4)
TOLD = replace(PLAIN, classes=3, text_width=7, text_tokens=S)


@cache
def awake(config: VideoDiTConfig) -> VideoDiT:
    torch.manual_seed(0)
    return perturbed(VideoDiT(config), 0.15).requires_grad_(False)


def clip(model: VideoDiT, frames: int = 4, height: int = 8, width: int = 12) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    shape = (B, model.config.channels, frames, height, width)
    return torch.randn(shape, generator=g), torch.rand(B, generator=g)


def prompt(*lengths: int, tokens: int = S) -> Cond:
    """Random text, real in its first rows, and a label."""
    g = torch.Generator().manual_seed(2)
    valid = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    text = torch.randn(len(lengths), S, 7, generator=g)
    text = F.pad(text, (0, 0, 0, tokens - S))
    return Cond(label=torch.arange(len(lengths)), text=text, text_mask=valid)


def test_a_fresh_model_says_zero() -> None:
    model = VideoDiT(TOLD)
    assert not model(*clip(model), prompt(3, 5)).any()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_tokens_and_the_macs_that_are_stated(name: str) -> None:
    with torch.device("meta"):
        model = VideoDiT.preset(name).eval()
        x, t = torch.zeros(1, *model.sample_shape), torch.zeros(1)
        macs = count_macs(model, x, t, Cond()).total
    c, L = model.config, model.layout(model.sample_shape)[0].length
    D, values = c.width, 3 * c.sides[1] ** 2
    tokens = 12 * D**2 + 2 * L * D
    once = 256 * D + D**2 + c.depth * 6 * D**2 + 2 * D**2
    assert macs == c.depth * L * tokens + 2 * L * values * D + once
    assert (L, round(macs / 1e9, 1)) == {"small": (1024, 5.2), "base": (4096, 241.8)}[name]
    block = 18 * D**2 + 15 * D + 2 * D // c.heads
    edges = 2 * values * D + D + values + (256 * D + D**2 + 2 * D) + 2 * D**2 + 2 * D
    assert parameter_count(model) == c.depth * block + edges


def obvious_attention(model: VideoDiT, h_BLD: Tensor, grid: Grid) -> Tensor:
    """The first block's attention, row by row and head by head, with complex rotations."""
    attn, c = model.blocks[0].attn, model.config
    q, k, v = attn.qkv(h_BLD).chunk(3, -1)
    turn = torch.polar(*(f(axial_angles(grid, model.split)) for f in (torch.ones_like, torch.clone)))

    def turned(x: Tensor, weight: Tensor) -> Tensor:
        x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)

    heads = []
    for i in range(c.heads):
        q_i, k_i, v_i = (x.chunk(c.heads, -1)[i].contiguous() for x in (q, k, v))
        score = turned(q_i, attn.norm_q.weight) @ turned(k_i, attn.norm_k.weight).mT
        heads.append((score / (c.width // c.heads) ** 0.5).softmax(-1) @ v_i)
    return attn.out(torch.cat(heads, -1))


def test_attention_equals_its_obvious_twin() -> None:
    model = perturbed(VideoDiT(PLAIN).double(), 0.15)
    block, grid, seen = model.blocks[0], Grid(2, 4, 6), {}

    def tap(fn: Callable[..., Tensor], x: Tensor, parts: Parts, *rest: Any) -> Tensor:
        shift, scale = parts.whole().chunk(6, -1)[:2]
        seen["in"], seen["out"] = modulate(block.norm(x), shift, scale), fn(x, parts, *rest)
        return seen["out"]

    x, t = clip(model)
    model(x.double(), t.double(), Cond(), Run({"blocks.0.attn": tap}))
    assert torch.allclose(seen["out"], obvious_attention(model, seen["in"], grid), atol=1e-6)


def test_tokens_in_another_order_with_their_positions_give_the_same() -> None:
    model = awake(PLAIN)
    tokens = model.tokenize(clip(model)[0], Cond())
    c_BD = torch.randn(B, 32)
    order = torch.randperm(48)
    moved, stack = tokens.rows("image", order), Stack(model.blocks, DIRECT)
    out = stack.beside(tokens.x, c_BD, tokens.rotary)
    assert torch.allclose(stack.beside(moved.x, c_BD, moved.rotary), out[:, order], atol=1e-5)
    assert not torch.allclose(stack.beside(moved.x, c_BD, tokens.rotary), out[:, order], atol=1e-2)


def test_only_differences_of_places_count() -> None:
    """The whole clip moved by two frames, one row and three columns."""
    model = awake(PLAIN)
    tokens = model.tokenize(clip(model)[0], Cond())
    angles = axial_angles(Grid(4, 5, 9), model.split).reshape(4, 5, 9, -1)[2:, 1:, 3:]
    stack, c_BD = Stack(model.blocks, DIRECT), torch.randn(B, 32)
    out = stack.beside(tokens.x, c_BD, tokens.rotary)
    moved = stack.beside(tokens.x, c_BD, rotary_table(angles.flatten(0, 2)))
    assert torch.allclose(moved, out, atol=1e-4)


def test_every_token_sees_every_other() -> None:
    model = awake(replace(PLAIN, depth=1))
    x, t = clip(model)
    x = x[:1].requires_grad_()
    out = model(x, t[:1], Cond())
    (gradient,) = torch.autograd.grad(out[0, 0, 0, 0, 0], x)
    assert gradient.ne(0).all()


@pytest.mark.parametrize("shape", [(2, 8, 12), (10, 4, 4), (4, 2, 30)])
def test_any_length_and_size_that_the_patch_divides(shape: tuple[int, int, int]) -> None:
    model = awake(TOLD)
    x, t = clip(model, *shape)
    text, image = model.layout(tuple(x.shape[1:]))
    assert (text.stream, text.length) == ("text", S)
    assert (image.stream, image.grid.shape) == ("image", (shape[0] // 2, shape[1] // 2, shape[2] // 2))
    assert model(x, t, prompt(3, 5)).shape == x.shape


def test_padding_of_the_text_influences_no_bit() -> None:
    model = awake(TOLD)
    x, t = clip(model)
    told = prompt(2, 4)
    out = model(x, t, told)
    assert told.text is not None and told.text_mask is not None
    for noise in (1e3, float("nan")):
        spoilt = told.text.masked_fill(~told.text_mask[..., None], noise)
        assert torch.equal(model(x, t, replace(told, text=spoilt)), out)
    assert not torch.allclose(model(x, t, replace(told, text=told.text + 1)), out, atol=1e-3)


def test_a_text_counts_the_same_among_more_padding() -> None:
    short, long = awake(TOLD), VideoDiT(replace(TOLD, text_tokens=9)).eval()
    long.load_state_dict(short.state_dict())
    x, t = clip(short)
    wide = prompt(2, 4, tokens=9)
    assert torch.allclose(long(x, t, wide), short(x, t, prompt(2, 4)), atol=1e-5)
    open_mask = replace(wide, text_mask=torch.ones(B, 9, dtype=torch.bool))
    assert not torch.allclose(long(x, t, open_mask), long(x, t, wide), atol=1e-3)


def test_a_full_mask_is_no_mask() -> None:
    model = awake(TOLD)
    x, t = clip(model)
    full = prompt(S, S)
    assert torch.allclose(model(x, t, full), model(x, t, replace(full, text_mask=None)), atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_a_dropped_sample_is_an_unconditional_one(masked: bool) -> None:
    model = awake(TOLD)
    x, t = clip(model)
    told = prompt(2, 4) if masked else replace(prompt(2, 4), text_mask=None)
    nothing = model(x, t, model.unconditional(told))
    half = model(x, t, replace(told, drop=torch.tensor([True, False])))
    assert torch.equal(half[0], nothing[0])
    assert torch.allclose(half[1], model(x, t, told)[1], atol=1e-6)
    other = replace(told, label=told.label + 1, text=told.text * 2)  # type: ignore[operator]
    assert torch.equal(model(x, t, model.unconditional(other)), nothing)


def test_labels_and_text_are_dropped_at_the_stated_rate_in_training_only() -> None:
    model = VideoDiT(replace(TOLD, label_dropout=0.25)).train()
    told = prompt(*[S] * 2000)
    told = replace(told, label=torch.ones(2000, dtype=torch.long))
    seen = model.prepare_cond(told, 2000)
    assert seen.label is not None and seen.text is not None
    dropped = seen.label == 3
    assert torch.equal(dropped, ~seen.text.flatten(1).any(1))
    assert 0.21 < dropped.float().mean() < 0.29
    assert torch.equal(model.eval().prepare_cond(told, 2000).label, told.label)  # type: ignore[arg-type]


def test_given_content_takes_the_place_of_noise() -> None:
    model = awake(PLAIN)
    x, t = clip(model)
    mask = torch.ones(B, 1, 4, 8, 12)
    mask[:, :, :2] = 0
    told = Cond(context=torch.randn_like(x), mask=mask)
    out = model(x, t, told)
    assert torch.equal(model(torch.where(mask.bool(), x, 9.0), t, told), out)
    assert not torch.allclose(model(x, t, replace(told, context=-told.context)), out)  # type: ignore[operator]
    assert torch.equal(model(x, t, model.unconditional(told)), model(x, t, Cond()))


def test_guidance_in_one_batch_equals_two_calls() -> None:
    model = awake(TOLD)
    options: dict[str, Any] = {"steps": 3, "guidance": ClassifierFree(2.0)}
    two, one = (draw(model, prompt(2, 4), [0, 1], batched=b, **options).samples for b in (False, True))
    assert torch.allclose(one, two, atol=1e-5)
    assert not torch.allclose(one, draw(model, prompt(2, 4), [0, 1], steps=3).samples, atol=1e-3)


def test_keys_pass_before_norm_and_rotation_with_their_positions() -> None:
    """Keys that are given twice change no softmax; scaled before the norm they do not count."""
    model = awake(PLAIN)
    x, t = clip(model)

    def twice(fn: Callable[..., KV], kv: KV) -> KV:
        kv = fn(kv)
        assert kv.position is not None and len(kv.position.cos) == kv.k.shape[2] == 48
        position = kv.position.rows("image", torch.arange(48).repeat(2))
        return KV(torch.cat([kv.k, 3 * kv.k], 2), torch.cat([kv.v, kv.v], 2), position)

    run = Run({f"blocks.{i}.attn.kv": twice for i in range(3)})
    assert torch.allclose(model(x, t, Cond(), run), model(x, t, Cond()), atol=1e-4)


def told(model: VideoDiT) -> Cond:
    return prompt(2, 4) if model.config.text_width else Cond()


@pytest.mark.parametrize("config", [PLAIN, TOLD], ids=["plain", "text"])
def test_selected_rows_equal_the_dense_run(config: VideoDiTConfig) -> None:
    """The same input twice: with the keys of all rows kept, those computed come out as in the dense run."""
    model = awake(config)
    x, t = clip(model)
    differences = []
    for keep_keys in (True, False):
        trajectory = Trajectory(model.sites(), [RowSelector(0.5, 1, keep_keys=keep_keys)], 2)
        first, second = (call_at(model, i, total=2) for i in range(2))
        dense = trajectory.leave(first, model(x, t, told(model), trajectory.run(first)))
        trajectory.guided(first, dense)
        sparse = model(x, t, told(model), trajectory.run(second))
        (session,) = trajectory.sessions
        assert isinstance(session, SelectedRows) and session.active is not None
        rows = torch.zeros(48, dtype=torch.bool).index_fill(0, session.active, True)
        made = by_row(rows, second.layout[-1], x)
        assert made.sum() == made.numel() // 2
        assert sparse[..., ~made].abs().max() == 0
        differences.append(float((sparse - dense)[..., made].abs().max() / dense.abs().max()))
    assert differences[0] <= 2e-6
    assert differences[1] > 1e-3


STEPS = 8


def sampled(policies: Sequence[Policy] = (), config: VideoDiTConfig = PLAIN) -> Any:
    model = awake(config)
    return draw(model, told(model), [3, 5], steps=STEPS, policies=policies)


@cache
def exact(config: VideoDiTConfig) -> Tensor:
    return sampled(config=config).samples


@pytest.mark.parametrize("config", [PLAIN, TOLD], ids=["plain", "text"])
@pytest.mark.parametrize("policy", [TaylorSeer(), RowSelector(), BandReuse(), Gate()], ids=str)
def test_neutral_settings_change_no_bit(policy: Policy, config: VideoDiTConfig) -> None:
    assert torch.equal(sampled([policy.exact()], config).samples, exact(config))


@pytest.mark.parametrize("config", [PLAIN, TOLD], ids=["plain", "text"])
def test_taylorseer_saves_every_second_evaluation(config: VideoDiTConfig) -> None:
    result = sampled([TaylorSeer(interval=2, order=1, warmup=2)], config)
    (receipt,) = result.receipts
    assert receipt.saved == 3 * 2 * config.depth  # evaluations 2, 4 and 6
    error = (result.samples - exact(config)).norm() / exact(config).norm()
    reuse = sampled([TaylorSeer(interval=2, order=0, warmup=2)], config).samples
    assert 0 < error < (reuse - exact(config)).norm() / exact(config).norm()


def test_a_gate_cuts_the_stack_and_attention_can_be_replaced() -> None:
    model = awake(PLAIN)
    trajectory = Trajectory(model.sites(), [Gate(10.0)], STEPS)
    x, t = clip(model)
    for i in range(STEPS):
        call = call_at(model, i, total=STEPS)
        trajectory.leave(call, model(x, t, Cond(), trajectory.run(call)))
    (session,) = trajectory.sessions
    assert isinstance(session, Gated)
    assert session.log == ["computed"] * 2 + ["skipped"] * (STEPS - 3) + ["computed"]
    assert trajectory.finish()[0].saved == STEPS - 3
    assert sampled([BandReuse(0.25)]).receipts[0].saved == 3 * 4


def test_one_number_or_a_tuple_comes_back_from_a_folder(tmp_path: Any) -> None:
    for i, config in enumerate((TOLD, replace(PLAIN, size=8, patch=2, rotary_split=(2, 4, 2)))):
        model = awake(config)
        loaded = Model.load(model.save(tmp_path / str(i)))
        assert loaded.config == config
        x, t = clip(model)
        assert torch.equal(loaded(x, t, prompt(2, 4)), model(x, t, prompt(2, 4)))


@pytest.mark.parametrize("training", [False, True])
def test_with_text_it_compiles_without_a_break(training: bool) -> None:
    torch.compiler.reset()
    model = perturbed(VideoDiT(TOLD), 0.15).train(training)
    cond = replace(prompt(2, 4), drop=torch.tensor([False, True]))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*clip(model), cond, run=DIRECT), model(*clip(model), cond))


def test_with_text_gradients_reach_everything_also_with_checkpointing_and_in_half() -> None:
    model = perturbed(VideoDiT(TOLD), 0.15).train()
    cond = replace(prompt(2, 4), drop=torch.tensor([False, True]))
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(*clip(model), cond).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(g is not None and g.any() for g in gradients[0].values())
    assert all(torch.equal(g, gradients[1][name]) for name, g in gradients[0].items())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(*clip(model), cond).isfinite().all()
    x, t = clip(model)
    assert model.bfloat16()(x.bfloat16(), t, cond).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (8, 9)}, r"frames=4, size=\(8, 9\) do not divide into patches of \(2, 2, 2\)"),
        ({"frames": 3}, "frames=3, size="),
        ({"patch": (1, 0, 2)}, r"patch=\(1, 0, 2\) should be at least 1"),
        ({"width": 30}, "width=30 does not divide into heads=4"),
        ({"width": 16}, "head width 4 should be even, at least 6"),
        ({"rotary_split": (2, 3, 3)}, r"rotary_split=\(2, 3, 3\) should be three even numbers"),
        ({"rotary_split": (4, 4)}, "sum to the head's 8 channels"),
        ({"rotary_base": 1.0}, "rotary_base=1.0 should be above 1"),
        ({"text_width": 7}, "text_width=7 and text_tokens=0 should both be 0, or neither"),
        ({"classes": -1}, "classes=-1 should be at least 0"),
        ({"label_dropout": 1.0}, r"label_dropout=1.0 should lie in \[0, 1\)"),
        ({"classes": 2, "class_names": ("a",)}, "1 class names for 2 classes"),
        ({"depth": 5000}, "depth=5000 should be at most 1000"),
    ],
    ids=str,
)
def test_configs_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DitkitError, match=message):
        replace(PLAIN, **change)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ShapeError, r"\[2, 2, 8, 12\] should be \[B, 2, T, H, W\]", lambda x, c: (x[:, :, 0], c)),
        (ShapeError, r"should be \[B, 2, T, H, W\]", lambda x, c: (x[:, :1], c)),
        (ShapeError, "frames=3 does not divide into patches of 2", lambda x, c: (x[:, :, :3], c)),
        (ConfigError, "a class label is needed", lambda x, c: (x, replace(c, label=None))),
        (ConfigError, "text tokens are needed", lambda x, c: (x, replace(c, text=None))),
        (ShapeError, r"\[2, 4, 7\] should be \[2, 5, 7\]", lambda x, c: (x, replace(c, text=c.text[:, 1:]))),
        (ShapeError, "text_mask .* of bool", lambda x, c: (x, replace(c, text_mask=c.text_mask.float()))),
    ],
    ids=range(7),
)
def test_inputs_that_do_not_fit_are_refused(
    error: type[Exception], message: str, call: Callable[..., Any]
) -> None:
    model = awake(TOLD)
    x, cond = call(clip(model)[0], prompt(2, 4))
    with pytest.raises(error, match=message):
        model(x, torch.rand(B), cond)
    with pytest.raises(ConfigError, match="unknown VideoDiT preset 'smal'; did you mean 'small'"):
        VideoDiT.preset("smal")
