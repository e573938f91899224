"""DiT^DH: wiring of trunk and head, modulation of each token, rotation, and its times of training and sampling."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.attention import Neighbourhood
from ditkit.caching import TaylorSeer
from ditkit.core.cond import Cond
from ditkit.core.errors import ConfigError, DitkitError, ShapeError
from ditkit.core.grid import Grid
from ditkit.core.path import Linear
from ditkit.core.time_grid import Shift
from ditkit.core.trajectory import Trajectory
from ditkit.models.ddt import DDTBlock, DiTDH, DiTDHConfig, _rotary
from ditkit.nn.rotary import rotate
from ditkit.sample import Autoguidance, Euler, sample
from ditkit.train.timesteps import BY_DIMENSION, LogitNormal, Shifted
from models_support import perturbed

TINY = DiTDHConfig.tiny()


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Cond]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, TINY.channels, TINY.size, TINY.size, generator=generator)
    return x, torch.rand(batch, generator=generator), Cond(label=torch.arange(batch))


def model(**changed: Any) -> DiTDH:
    torch.manual_seed(0)
    return perturbed(DiTDH(DiTDHConfig(**{**vars(TINY), **changed})), 0.1).eval()


def test_a_fresh_network_says_0_and_its_blocks_are_the_identity() -> None:
    torch.manual_seed(0)
    fresh = DiTDH(TINY)
    assert not fresh(*inputs()).any()
    x, c = torch.randn(2, 16, TINY.width), torch.randn(2, TINY.width)
    assert torch.equal(fresh.blocks[0](x, c, _rotary(Grid.of((4, 4), 1), 8, x.device)), x)
    spread = fresh.blocks[0].mlp.gate.weight.std().item() * TINY.width**0.5
    assert spread == pytest.approx(3**-0.5, rel=0.2)  # torch's own, not Xavier's


def test_the_trunk_reaches_the_output_through_s_alone() -> None:
    network, (x, t, cond) = model(), inputs()
    x.requires_grad_(True)
    s = network.condition_tokens(x, t, cond)
    network.refine(x, s.detach()).square().sum().backward()
    trunk = [*network.blocks.parameters(), *network.embed.parameters(), *network.time.parameters()]
    assert all(p.grad is None for p in (*trunk, network.label.weight))
    assert x.grad is not None and x.grad.any()  # by the head's own embedding
    assert network.wide_embed.weight.grad is not None and network.project.weight.grad is not None
    assert torch.equal(network.refine(x, s), network(x, t, cond))


def test_modulation_of_equal_rows_is_that_of_the_sample() -> None:
    torch.manual_seed(0)
    block: Any = perturbed(DDTBlock(24, 3), 0.1).double()  # type: ignore[arg-type]
    x, c = torch.randn(2, 9, 24).double(), torch.randn(2, 24).double()
    rotary = _rotary(Grid.of((3, 3), 1), 8, x.device)
    whole, each = block(x, c, rotary), block(x, c[:, None].expand(-1, 9, -1), rotary)
    torch.testing.assert_close(each, whole, rtol=0, atol=1e-12)
    other = c[:, None].expand(-1, 9, -1).clone()
    other[:, 4] += 1
    assert not torch.allclose(block(x, other, rotary)[:, 4], whole[:, 4])


def test_scores_depend_on_the_distance_of_two_tokens_alone() -> None:
    grid = Grid.of((5, 5), 1)
    table = _rotary(grid, 8, torch.device("cpu"))
    q, k = torch.randn(2, 1, 1, 1, 8).double()
    scores = rotate(q.expand(-1, -1, 25, -1), table) @ rotate(k.expand(-1, -1, 25, -1), table).mT
    for (a, b), (c, d) in (((0, 6), (12, 18)), ((1, 10), (13, 22))):  # the same offset, elsewhere
        assert scores[0, 0, a, b].item() == pytest.approx(scores[0, 0, c, d].item(), abs=1e-5)
    assert scores[0, 0, 0, 1].item() != pytest.approx(scores[0, 0, 0, 5].item(), abs=1e-4)


def test_a_shift_moves_the_logit() -> None:
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    a = Shift.of_dimension(768 * 16 * 16).a
    assert a == pytest.approx(48**0.5) and Shift.of_dimension(768 * 32 * 32).a == pytest.approx(
        13.8564, abs=1e-4
    )
    assert Shift.of_dimension(4 * 32 * 32).a == 1 and torch.equal(Shift(1.0).warp(t), t)
    moved = Shift(a).warp(t)
    torch.testing.assert_close(moved.logit(), t.logit() + torch.tensor(a).double().log())
    torch.testing.assert_close(Shift(1 / a).warp(moved), t)
    assert (moved.diff() > 0).all()
    assert Shift(a).warp(torch.tensor([0.0, 1.0])).tolist() == [0, 1]
    quarters = Shift(a).warp(torch.tensor([0.25, 0.5, 0.75])).tolist()
    assert quarters == pytest.approx([0.698, 0.874, 0.954], abs=5e-4)


def test_times_of_training_follow_from_the_dimension() -> None:
    u = torch.linspace(0, 1 - 1e-9, 1001, dtype=torch.float64)
    of_latents = BY_DIMENSION.of((768, 16, 16))
    assert isinstance(of_latents, Shifted) and of_latents.shift == pytest.approx(48**0.5)
    assert torch.equal(of_latents.quantile(u), Shift(48**0.5).warp(LogitNormal(last=0.999).quantile(u)))
    assert LogitNormal(last=0.7).quantile(u).max() <= 0.7 + 1e-9
    assert LogitNormal().of((4, 4)) == LogitNormal() and Shifted(2.0).of((768, 16, 16)) == Shifted(2.0)
    with pytest.raises(ConfigError, match=r"shift=None is that of a sample's dimension"):
        BY_DIMENSION.quantile(u)


def test_eulers_steps_on_the_shifted_grid_draw_a_gaussian() -> None:
    """The exact velocity of N(0, S): x_t has (1 - t)^2 S + t^2, and v is linear in x."""
    values, errors = torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64), []
    for steps in (50, 100, 200, 400, 3200):
        times = Euler(Shift(48**0.5)).times(Linear(), steps)
        scale = torch.ones(3, dtype=torch.float64)
        for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
            variance = (1 - t) ** 2 * values + t**2
            scale = scale * (1 + (s - t) * (t - (1 - t) * values) / variance)
        errors.append(((scale.square() - values) / values).abs().max().item())
    halved = [b / a for a, b in pairwise(errors[:4])]
    assert all(0.45 < share < 0.6 for share in halved) and errors[-1] < 0.005  # order 1


def test_it_is_drawn_under_a_cache_and_a_weaker_guide() -> None:
    network, guide = model(), model(width=8, heads=1, depth=1)
    cond = Cond(label=torch.tensor([1, 2]))
    options: dict[str, Any] = {"steps": 6, "solver": Euler(Shift.of_dimension(768 * 16 * 16, end=0.001))}

    def drawn(scale: float, **more: Any) -> Tensor:
        return sample(network, cond, [0, 1], guidance=Autoguidance(scale, guide), **options, **more).samples

    plain, guided, cached = drawn(1.0), drawn(1.42), drawn(1.42, policies=[TaylorSeer(interval=3)])
    assert plain.shape == (2, *network.sample_shape)
    assert not torch.equal(guided, plain) and not torch.equal(cached, guided)
    assert ((cached - guided).norm() / guided.norm()).item() < 0.5


def test_what_moves_rows_is_refused_by_name() -> None:
    with pytest.raises(DitkitError, match=r"attention works in stages \[0, 1\], expected one"):
        Trajectory(model().sites(), [Neighbourhood(radius=2, pooled=2, block=8, kernel="cpu")], 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_width": 26}, r"head_width=26 should divide into 3 heads of whole pairs on two axes, by 12"),
        ({"width": 12}, r"width=12 should divide into 2 heads of whole pairs on two axes, by 8"),
        ({"head_depth": 0}, r"head_depth=0 should be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises((ConfigError, ShapeError), match=message):
        DiTDHConfig(**{**vars(TINY), **change})


def test_presets() -> None:
    with torch.device("meta"):
        xl = DiTDH.preset("XL", size=32)
    assert (len(xl.blocks), len(xl.wide), xl.sample_shape) == (28, 2, (768, 32, 32))
    with pytest.raises(ConfigError, match=r"unknown DiTDH preset 'XXL'"):
        DiTDH.preset("XXL")
    with pytest.raises(ConfigError, match=r"end=1\.0 should lie in"):
        Shift(2.0, 1.0)
    with pytest.raises(ConfigError, match="a sample of 0 values"):
        Shift.of_dimension(0)
