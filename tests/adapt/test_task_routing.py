"""Task routing: the bypass, the clock of every path, the control, and what a trained model cannot do without."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import ditkit
from ditkit.adapt import TaskRouting
from ditkit.adapt.task_routing import routed
from ditkit.attention import Neighbourhood
from ditkit.caching import TaylorSeer
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError
from ditkit.core.model import Model
from ditkit.core.path import PATHS
from ditkit.core.trajectory import Trajectory
from ditkit.hosts.streams import Streams
from ditkit.nn.task_windows import offsets, windows
from ditkit.train.taps import run_with_taps
from rig import noise, tiny_dit

T = torch.tensor([0.3, 0.95])
COND = Cond(label=torch.tensor([0, 2]))


def out(policy: TaskRouting | None, x: Tensor | None = None, t: Tensor = T, cond: Cond = COND) -> Tensor:
    model = tiny_dit().adopt([] if policy is None else [policy])
    x = noise() if x is None else x
    found: Tensor = run_with_taps(model, model, (), (3, 8, 8), x, t, cond, times=t).out
    return found


def test_all_channels_shared_is_the_plain_model_to_the_bit():
    plain = out(None)
    assert torch.equal(out(TaskRouting(share=1.0)), plain)
    assert not torch.equal(out(TaskRouting()), plain)


def test_windows_overlap_as_their_offsets_say():
    first, rows = (f(torch.arange(1000), 384, 0.8, 4.0) for f in (offsets, windows))
    assert first[0] == 0 and first[-1] == 77 and (first.diff() >= 0).all()
    for a, b in ((0, 999), (500, 750), (900, 901)):
        assert int((rows[a] & rows[b]).sum()) == 307 - abs(int(first[a] - first[b]))


def test_inactive_channels_bypass_the_block_and_are_written_to():
    """The gradient with respect to them is the identity: no path leads through attention or MLP."""
    model, c = tiny_dit(), torch.randn(2, 32)
    mask = partial(TaskRouting().mask, torch.tensor([200, 999]), name="blocks.0")
    rows = mask(channels=32)
    x = torch.randn(2, 16, 32, requires_grad=True)
    result = routed(mask, model.blocks[0], x, c)
    assert (result - x).abs().min() > 0
    weight = torch.randn_like(result)
    (gradient,) = torch.autograd.grad((result * weight).sum(), x)
    inactive = ~rows[:, None].expand_as(x)
    assert torch.equal(gradient[inactive], weight[inactive])
    assert (gradient != weight)[~inactive].all()
    with torch.no_grad():
        model.blocks[0].modulation.weight.zero_()
        model.blocks[0].modulation.bias.zero_()
    assert torch.equal(routed(mask, model.blocks[0], x, c), x)


def test_a_sample_has_its_own_window():
    for policy in (TaskRouting(), TaskRouting(routes="random")):
        both = out(policy)
        for i in range(2):
            alone = out(policy, noise()[i : i + 1], T[i : i + 1], Cond(label=COND.label[i : i + 1]))
            assert torch.allclose(both[i], alone[0], atol=1e-5)


@pytest.mark.parametrize("path", ["ddpm", *PATHS])
def test_the_last_task_is_the_noisiest_on_every_path(path):
    task = TaskRouting(path=path).tasks(torch.linspace(0.001, 1, 50))
    assert task[0] == 0 and task[-1] > 990 and (task.diff() >= 0).all()  # the path vp keeps some signal
    if path == "ddpm":
        assert torch.equal(TaskRouting().tasks((torch.arange(1000) + 1) / 1000), torch.arange(1000))


def test_the_control_is_another_draw_in_every_block_and_task():
    policy, task = TaskRouting(routes="random"), torch.tensor([1, 2])
    one, other = (policy.mask(task, 32, name) for name in ("blocks.0", "blocks.1"))
    assert (one.sum(1) == 25).all() and (one[0] != one[1]).any() and (one != other).any()
    assert torch.equal(policy.mask(task, 32, "blocks.0"), one)


def test_two_streams_have_windows_of_their_own_width():
    mask = partial(TaskRouting().mask, torch.tensor([999]), name="b")
    x = Streams(torch.ones(1, 3, 20), torch.ones(1, 2, 10))
    found: Any = routed(mask, lambda s: s, x)
    assert torch.equal(found.image, x.image) and torch.equal(found.text, x.text)
    masked: Any = routed(mask, lambda s: Streams(*(0 * h for h in s)), x)
    assert masked.image[0, 0].tolist() == [1.0] * 4 + [0.0] * 16
    assert masked.text[0, 0].tolist() == [1.0] * 2 + [0.0] * 8


def test_a_model_trained_so_is_sampled_so_unless_it_is_named(tmp_path):
    model: Model = ditkit.load(tiny_dit().adopt([TaskRouting(path="linear")]).save(tmp_path))

    def drawn(*policies: Any) -> Tensor:
        found: Tensor = ditkit.generate(model, [0, 1], seeds=(0, 1), steps=6, policies=policies).samples
        return found

    own, plain = drawn(), drawn(TaskRouting(share=1.0))
    assert torch.equal(own, drawn(TaskRouting(path="linear"))) and not torch.equal(own, plain)
    cache, pattern = TaylorSeer(interval=3, order=1), Neighbourhood(radius=2, block=8, kernel="cpu")
    assert not torch.equal(drawn(cache), own) and drawn(cache, pattern).isfinite().all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"times \[2, 4\], expected one a sample"):
        TaskRouting().tasks(torch.zeros(2, 4))
    with pytest.raises(ConfigError, match="TaskRouting: share=0"):
        TaskRouting(share=0.0)
    with pytest.raises(ConfigError, match="routes"):
        TaskRouting(routes="window")  # type: ignore[arg-type]
    assert Trajectory(tiny_dit().sites(), [TaskRouting()], 1).claims[0]["blocks.2"] == "wrap"
