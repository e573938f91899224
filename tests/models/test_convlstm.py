from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ditkit.core.errors import ConfigError, ShapeError
from ditkit.core.model import Model, parameter_count
from ditkit.core.run import Run
from ditkit.models.convlstm import Cell, ConvLSTM, ConvLSTMConfig
from ditkit.sample.forecast import forecast
from models_support import perturbed

TINY = ConvLSTMConfig(
    channels=2, frames=4, size=(8, 12), patch=2, states=(6, 5), input_kernel=3, state_kernel=3
)


def tiny(**changes: object) -> ConvLSTM:
    torch.manual_seed(0)
    return perturbed(ConvLSTM(replace(TINY, **changes)), 0.1)


@pytest.mark.parametrize(
    ("states", "input_kernel", "state_kernel", "parameters"),
    [
        ((256,), 5, 5, 13_524_496),
        ((128, 128), 5, 5, 10_042_896),
        ((128, 64, 64), 5, 5, 7_585_296),
        ((128, 128), 9, 1, 11_550_224),
    ],
)
def test_parameters_are_those_of_the_papers_first_table(states, input_kernel, state_kernel, parameters):
    with torch.device("meta"):
        model = ConvLSTM(ConvLSTMConfig(states=states, input_kernel=input_kernel, state_kernel=state_kernel))
    assert parameter_count(model) == parameters


def test_a_step_is_equation_3():
    torch.manual_seed(0)
    cell = Cell(3, 2, 1, 1).double()
    with torch.no_grad():
        cell.peephole.normal_()
    x, h, c = (torch.randn(1, n, 1, 1, dtype=torch.float64) for n in (3, 2, 2))
    sums = cell.input.weight[:, :, 0, 0] @ x.flatten() + cell.state.weight[:, :, 0, 0] @ h.flatten()
    i, f, g, o = (sums + cell.state.bias).unflatten(0, (4, 2))
    wi, wf, wo = cell.peephole.flatten(1)
    old = c.flatten()
    new = (f + wf * old).sigmoid() * old + (i + wi * old).sigmoid() * g.tanh()
    said = (o + wo * new).sigmoid() * new.tanh()
    h, c = cell.step(x, h, c)
    assert torch.allclose(c.flatten(), new) and torch.allclose(h.flatten(), said)


def test_layers_run_over_time_as_the_step_by_step_network_does():
    """Encoder and forecaster unrolled the plain way: all layers of one step, then the next step."""
    model = tiny().double()
    x = torch.randn(2, *model.sample_shape, dtype=torch.float64)
    frames = model.tokenize(x)
    states = [tuple(frames.new_zeros(2, 2, n, 4, 6)) for n in TINY.states]
    for t in range(TINY.frames):
        h = frames[:, t]
        for i, cell in enumerate(model.encoder):
            h, c = cell.step(h, *states[i])
            states[i] = (h, c)
    out = []
    for _ in range(TINY.frames):
        h = None
        for i, cell in enumerate(model.forecaster):
            h, c = cell.step(h, *states[i])
            states[i] = (h, c)
        out.append(torch.cat([h for h, _ in states], 1))
    assert torch.allclose(model.head(torch.stack(out, 1)), model(x), atol=1e-12)


def test_cutting_frames_into_channels_is_undone_by_the_head():
    model = tiny()
    x = torch.randn(2, *model.sample_shape)
    pixels = TINY.channels * TINY.patch**2
    with torch.no_grad():
        model.out.weight.copy_(torch.eye(pixels, sum(TINY.states))[:, :, None, None])
        model.out.bias.zero_()
    cut = model.tokenize(x)
    padded = torch.nn.functional.pad(cut, (0, 0, 0, 0, 0, sum(TINY.states) - pixels))
    assert torch.equal(model.head(padded), x)


def test_gradient_reaches_every_parameter_with_and_without_checkpointing():
    model = tiny().train()
    x = torch.randn(2, *model.sample_shape)
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(x).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_sites_are_visited_and_other_lengths_and_sizes_run():
    model = tiny()
    seen = []
    run = Run({s.name: lambda fn, *args, s=s: (seen.append(s.name), fn(*args))[1] for s in model.sites()})
    x = torch.randn(1, 2, 3, 4, 10)
    assert torch.equal(model(x, run=run), model(x)) and model(x).shape == x.shape
    assert seen == ["tokens", "head"]
    assert model.layout((2, 3, 4, 10))[0].grid.shape == (3, 2, 5)
    assert forecast(model, x, 7).shape == (1, 2, 7, 4, 10)


def test_saving_compiling_and_half_precision(tmp_path):
    model = tiny()
    x = torch.randn(2, *model.sample_shape)
    assert torch.equal(Model.load(model.save(tmp_path))(x), model(x))
    torch.compiler.reset()
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))
    half = model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"size": 9}, "size=9x9"),
        ({"states": ()}, r"states=\(\)"),
        ({"state_kernel": 4}, "state_kernel=4 should be odd"),
        ({"patch": 0}, "patch=0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(change, says):
    with pytest.raises((ConfigError, ShapeError), match=says):
        replace(TINY, **change)


def test_wrong_inputs_are_refused():
    with pytest.raises(ShapeError, match=r"\[1, 3, 4, 8, 12\] should be \[B, 2, T, H, W\]"):
        tiny()(torch.zeros(1, 3, 4, 8, 12))
    with pytest.raises(ShapeError, match="width=11"):
        tiny()(torch.zeros(1, 2, 4, 8, 11))
