"""The four ways of telling a VDT given content: what counts, what it costs, and samples that keep what was given."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ditkit.caching.taylorseer import TaylorSeer
from ditkit.core.cond import Cond
from ditkit.core.convention import DDPM, Convention
from ditkit.core.errors import ConfigError, ShapeError
from ditkit.core.grid import Grid, patchify
from ditkit.core.model import parameter_count
from ditkit.core.run import Run
from ditkit.models.vdt import VDT
from ditkit.sample import sample
from ditkit.sample.guidance import ClassifierFree
from ditkit.sample.solvers import Ddim, Euler
from vdt_support import SMALL, awake, batch, frames_given, ways


@ways
@pytest.mark.parametrize("convention", [DDPM, Convention()])
def test_a_fresh_model_outputs_zero_though_its_temporal_branches_do_not(convention, way):
    model = VDT(replace(SMALL, convention=convention, conditioning=way))
    x, t = batch()
    out = model(x, t, frames_given([0], [], [1, 3]))
    assert out.shape == (3, 6 if convention is DDPM else 3, 4, 4, 6)
    assert torch.equal(out, torch.zeros_like(out))
    assert model.blocks[0].temporal_attn.fc.weight.std() > 0.1


@ways
@pytest.mark.parametrize("shape", [(1, 4, 6), (5, 2, 4), (9, 6, 2)])
def test_any_length_and_size_runs(way, shape):
    config = replace(SMALL, conditioning=way)
    model, shaped = awake(config), replace(config, frames=shape[0], size=shape[1:])
    x, t = batch(shaped, 2)
    out = model(x, t, frames_given([0], [], config=shaped))
    assert out.shape == x.shape and out.isfinite().all()
    layout = model.layout(tuple(x.shape[1:]))
    assert layout[-1].grid == Grid(shape[0], shape[1] // 2, shape[2] // 2)
    assert [segment.stream for segment in layout] == (["context", "image"] if way == "concat" else ["image"])


@ways
def test_only_what_is_given_counts_and_nothing_of_the_noise_in_its_place(way):
    model = awake(replace(SMALL, conditioning=way))
    x, t = batch()
    cond = frames_given([0, 1], [3], [])
    cond.mask[1, :, :, :2] = 0  # a region of every frame, too
    made = cond.mask.bool()
    out = model(x, t, cond)
    assert torch.equal(model(torch.where(made, x, torch.nan), t, cond), out)
    hidden = replace(cond, context=torch.where(made, torch.nan, cond.context))
    assert torch.equal(model(x, t, hidden), out)
    assert torch.equal(model(x, t, replace(cond, mask=made)), out)
    other = model(x, t, replace(cond, context=cond.context + 1))
    assert not torch.allclose(other[:2], out[:2], atol=1e-3)
    assert torch.equal(other[2], out[2])


@ways
def test_nothing_given_is_no_mask(way):
    model = awake(replace(SMALL, conditioning=way))
    x, t = batch()
    cond = frames_given([], [], [])
    assert torch.allclose(model(x, t, cond), model(x, t, Cond(label=cond.label)), atol=1e-5)


def test_concatenation_in_token_space_is_the_mask_on_whole_frames():
    """So the default is the paper's concatenation, at half its tokens; regions are what the mask adds."""
    masked = awake()
    concatenated = VDT(replace(SMALL, conditioning="concat")).eval()
    concatenated.load_state_dict(masked.state_dict())
    x, t = batch(size=4)
    cond = frames_given([0, 1], [3], [], [0, 2, 3])
    made = cond.mask.bool().expand_as(x)
    one, two = masked(x, t, cond), concatenated(x, t, cond)
    assert torch.allclose(one[made], two[made], atol=1e-5)
    cond.mask[0, :, 3, :2] = 0
    assert not torch.allclose(masked(x, t, cond)[0, :, 2], concatenated(x, t, cond)[0, :, 2], atol=1e-3)


@ways
def test_only_a_way_that_needs_parameters_has_them(way):
    extra = parameter_count(VDT(replace(SMALL, conditioning=way))) - parameter_count(VDT(SMALL))
    D = SMALL.width
    cross = SMALL.depth * (4 * D**2 + 4 * D + 2 * D) + D
    assert extra == {"mask": 0, "concat": 0, "adaln": D**2 + D, "cross": cross}[way]


@ways
def test_gradient_reaches_every_parameter(way):
    model = awake(replace(SMALL, conditioning=way)).train()
    x, t = batch()
    cond = replace(frames_given([0], [1, 2], []), drop=torch.tensor([False, True, False]))
    model(x, t, cond).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@ways
def test_a_sample_does_not_depend_on_its_neighbours(way):
    model = awake(replace(SMALL, conditioning=way)).double()
    x, t = (v.double() for v in batch())
    cond = frames_given([0, 1], [3], [])
    alone = [model(x[i : i + 1], t[i : i + 1], cond.rows(slice(i, i + 1))) for i in range(3)]
    assert torch.allclose(torch.cat(alone), model(x, t, cond), atol=1e-12)


@ways
def test_compiled_and_checkpointed_and_in_half_precision(way):
    torch.compiler.reset()
    model = awake(replace(SMALL, conditioning=way, depth=1))
    x, t = batch()
    cond = frames_given([0], [1, 2], [])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, t, cond), model(x, t, cond))
    model.train()
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(x, t, replace(cond, drop=torch.zeros(3, dtype=torch.bool))).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    out = model.eval().bfloat16()(x.bfloat16(), t, cond)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_without_a_label_the_class_is_the_first():
    model = awake()
    x, t = batch()
    assert torch.equal(model(x, t, Cond()), model(x, t, Cond(label=torch.zeros(3, dtype=torch.long))))


def test_told_nothing_is_all_to_be_made_of_the_null_class():
    model = awake()
    x, t = batch()
    cond = frames_given([0], [1, 2], [0, 1, 2, 3])
    null = Cond(label=torch.full((3,), 3))
    assert torch.equal(model(x, t, model.unconditional(cond)), model(x, t, null))
    assert torch.equal(model(x, t, model.unconditional(replace(cond, label=None))), model(x, t, null))
    with pytest.raises(ConfigError, match="neither a label nor a mask"):
        model.unconditional(Cond())


@ways
def test_given_frames_come_out_as_they_went_in_and_are_seen_so_at_every_step(way):
    model = awake(replace(SMALL, conditioning=way))
    cond = frames_given([0, 1], [3])
    made, seen = cond.mask.bool(), []
    model.embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    out = sample(model, cond, [5, 6], steps=3).samples
    assert torch.equal(out.masked_fill(made, 0), cond.context.masked_fill(made, 0))
    assert not torch.allclose(out, cond.context)
    clean = patchify(cond.context.masked_fill(made, 0), 2)
    if way == "mask":
        given = ~patchify(made, 2).any(-1)
        assert len(seen) == 3 and all(torch.equal(patches[given], clean[given]) for patches in seen)
    else:
        assert sum(torch.equal(patches, clean) for patches in seen) == 3


def test_a_seed_makes_the_same_clip_whatever_the_mask_of_its_neighbour():
    model = awake()
    cond = frames_given([0, 1], [3])
    both = sample(model, cond, [5, 6], steps=3).samples
    alone = sample(model, cond.rows(slice(1, 2)), [6], steps=3).samples
    assert torch.allclose(both[1:], alone, atol=1e-5)


@ways
def test_taylorseer_works_unchanged(way):
    model = awake(replace(SMALL, conditioning=way))
    cond = frames_given([0, 1], [3])
    exact = sample(model, cond, [5, 6], steps=6).samples
    neutral = sample(model, cond, [5, 6], steps=6, policies=[TaylorSeer(interval=1)])
    assert torch.equal(neutral.samples, exact)
    forecast = sample(model, cond, [5, 6], steps=6, policies=[TaylorSeer(interval=2, order=1, warmup=2)])
    assert forecast.receipts[0].saved
    error = (forecast.samples - exact).norm() / exact.norm()
    assert 0 < error < 0.5


@pytest.mark.parametrize(("convention", "solver"), [(DDPM, Ddim()), (Convention(), Euler())])
def test_guidance_leaves_the_condition_out_in_two_calls_or_one(convention, solver):
    model = awake(replace(SMALL, convention=convention))
    cond = frames_given([0, 1], [3])
    two, one = (
        sample(
            model, cond, [5, 6], steps=3, solver=solver, guidance=ClassifierFree(2.0), batched=batched
        ).samples
        for batched in (False, True)
    )
    assert torch.allclose(two, one, atol=1e-4)
    assert not torch.allclose(two, sample(model, cond, [5, 6], steps=3, solver=solver).samples, atol=1e-2)


def test_concatenation_needs_every_row():
    model = awake(replace(SMALL, conditioning="concat"))
    x, t = batch()
    run = Run({"tokens": lambda fn, *args: fn(*args).rows("image", torch.arange(6))})
    with pytest.raises(ShapeError, match="conditioning='concat' needs every row"):
        model(x, t, Cond(), run=run)
