"""Paired losses: equal arms differ by nothing, a known error is found, and intervals cover what they should."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from ditkit.bench.paired import Draws, PairedLosses, bootstrap, paired_loss
from ditkit.core.cond import Cond
from ditkit.core.convention import DDPM, SIT, Convention
from ditkit.core.errors import ConfigError, ShapeError
from ditkit.core.grid import Segment
from ditkit.core.model import Denoiser
from ditkit.core.run import DIRECT, Run, Site
from ditkit.models.dit import DiT
from ditkit.train.denoising import Denoising
from ditkit.train.optimizers import optimizers_of
from ditkit.train.randomness import SampleRNG
from ditkit.train.settings import Settings
from ditkit.train.timesteps import LogitNormal
from models_support import tiny_model

SHAPE = (2, 4, 4)
FEW = Draws(count=96)


class Clouds:
    """Held-out samples [2, 4, 4] of a standard normal distribution, each with a label of four."""

    def __init__(self, count: int = 64, shape: tuple[int, ...] = SHAPE, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.data = torch.randn(count, *shape, generator=generator)
        self.asked: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: Tensor, rng: SampleRNG) -> tuple[Tensor, Cond]:
        self.asked.append(indices)
        return self.data[indices], Cond(label=indices % 4)


class Exact(Denoiser):
    """The best prediction of standard normal data in any convention, and `error` more in every element.

    With data and noise of variance 1, E[data | x] = alpha x / (alpha^2 + sigma^2), and the noise's alike.
    """

    def __init__(self, convention: Convention, error: float = 0.0) -> None:
        super().__init__()
        self.config = SimpleNamespace(convention=convention)
        self.error = nn.Parameter(torch.tensor(error))

    def sites(self) -> tuple[Site, ...]:
        return ()

    def layout(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        return ()

    def unconditional(self, cond: Cond) -> Cond:
        return cond

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return SHAPE

    def forward(self, x: Tensor, t: Tensor, cond: Cond, run: Run = DIRECT) -> Tensor:
        convention, path = self.config.convention, self.config.convention.make_path()
        time = 1 - t if convention.time == "data" else t
        c = path.at(time[:, None, None, None])
        total = c.alpha**2 + c.sigma**2
        data, noise = c.alpha * x / total, c.sigma * x / total
        out = {
            "data": data,
            "noise": noise,
            "velocity": c.alpha_rate * data + c.sigma_rate * noise,
            "score": -noise / c.sigma,
        }[convention.prediction]
        out = out + self.error
        out = -out if convention.time == "data" and convention.prediction == "velocity" else out
        return out if convention.extra == "none" else torch.cat([out, torch.zeros_like(out)], dim=1)


def test_equal_models_differ_by_nothing() -> None:
    losses = paired_loss({"one": tiny_model(), "other": tiny_model()}, Clouds(64, (3, 16, 16)), FEW)
    found = losses.difference("one", "other")
    assert (found.mean, found.interval, found.relative) == (0.0, (0.0, 0.0), (0.0, 0.0, 0.0))
    assert found.verdict() == "not resolved at this size"


@pytest.mark.parametrize(
    "convention",
    [
        Convention(),
        Convention("cosine"),
        SIT,
        Convention(prediction="data"),
        Convention(prediction="noise"),
        DDPM,
        Convention("ddpm", "data", "index"),
    ],
    ids=lambda c: f"{c.path}-{c.prediction}-{c.time}",
)
def test_an_added_error_is_found_at_its_size(convention: Convention) -> None:
    """An error e in every element of the model's own prediction adds e^2 to its loss."""
    losses = paired_loss({"off": Exact(convention, 0.3), "exact": Exact(convention)}, Clouds(512), Draws(512))
    found = losses.difference("off", "exact")
    assert found.interval[0] < 0.09 < found.interval[1]
    assert found.verdict() == "refuted" and losses.difference("exact", "off").verdict() == "held"
    assert found.relative[0] == pytest.approx(found.mean / losses.mean("exact"))


def test_the_loss_is_the_one_that_training_lowers() -> None:
    """The mean over draws is `Denoising`'s loss on the same data, noise and times."""
    for convention in (Convention(), SIT, Convention(prediction="score"), DDPM):
        model, samples = tiny_model(convention=convention), Clouds(16, (3, 16, 16))
        losses = paired_loss({"it": model}, samples, Draws(16))
        (batch,) = Draws(16).batches(samples, 16)
        path = convention.make_path()
        expected = Denoising().at(
            model,
            model,
            path=path,
            data=batch.data,
            noise=batch.noise,
            t=path.place(batch.t),
            cond=batch.cond,
        )
        assert losses.mean("it") == pytest.approx(expected["loss"].item(), rel=1e-6)


def test_given_content_is_not_judged() -> None:
    """Where the mask is 0 an error costs nothing, and elements there count as 0, as in training."""
    samples, mask = Clouds(), torch.ones(1, 1, 4, 4)
    mask[..., :2] = 0
    plain = paired_loss({"it": Exact(Convention())}, samples, FEW).losses["it"]
    masked = paired_loss({"it": Exact(Convention())}, Masked(mask), FEW).losses["it"]
    assert (masked < plain).all() and masked.mean().item() == pytest.approx(plain.mean().item() / 2, rel=0.1)
    nothing = paired_loss({"it": Exact(Convention(), 9.0)}, Masked(0 * mask), FEW).losses["it"]
    assert torch.equal(nothing, torch.zeros_like(nothing))


class Masked(Clouds):
    """The same samples, of which a part is given."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def batch(self, indices: Tensor, rng: SampleRNG) -> tuple[Tensor, Cond]:
        data, cond = super().batch(indices, rng)
        return data, replace(cond, mask=self.mask.expand(len(data), -1, -1, -1))


def test_arms_of_different_predictions_meet_in_one_target() -> None:
    """One estimate said in three predictions has one loss; the clock and a second output change nothing either."""
    kinds = ("velocity", "noise", "data")
    arms = {kind: Exact(Convention(prediction=kind)) for kind in kinds} | {"sit": Exact(SIT)}  # type: ignore[arg-type]
    for target in kinds:
        found = paired_loss(arms, Clouds(), FEW, target=target).losses
        for name in arms:
            torch.testing.assert_close(found[name], found[target], rtol=1e-3, atol=1e-5)
    off = {"velocity": Exact(Convention()), "data": Exact(Convention(prediction="data"), 0.05)}
    assert (
        paired_loss(off, Clouds(512), Draws(512), target="velocity").difference("velocity", "data").verdict()
        == "held"
    )


def test_labels_reach_the_models() -> None:
    samples, model = Clouds(64, (3, 16, 16)), tiny_model()
    losses = paired_loss({"it": model}, samples, FEW).losses["it"]
    with torch.no_grad():
        model.get_parameter(label_table(model))[2] += 1.0
    changed = paired_loss({"it": model}, samples, FEW).losses["it"] != losses
    assert torch.equal(changed, torch.arange(96) % 64 % 4 == 2)


def label_table(model: DiT) -> str:
    """The name of the parameter with one row a class and one for none."""
    (name,) = (name for name, p in model.named_parameters() if p.ndim == 2 and len(p) == 5)
    return name


@pytest.mark.parametrize("batch_size", [1, 7, 96, 1000])
def test_draws_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    samples = Clouds()
    whole = next(iter(FEW.batches(samples, 96)))
    parts = list(FEW.batches(samples, batch_size))
    for name in ("index", "data", "noise", "t"):
        together = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(together, getattr(whole, name)), name
    assert torch.equal(torch.cat([part.cond.label for part in parts]), whole.cond.label)
    model = Exact(Convention(), 0.1)
    found, expected = (paired_loss({"it": model}, samples, FEW, batch_size=n) for n in (batch_size, 96))
    torch.testing.assert_close(found.losses["it"], expected.losses["it"], rtol=1e-6, atol=0)


def test_a_seed_gives_the_same_to_the_bit_and_another_another() -> None:
    arms = {"off": Exact(Convention(), 0.1), "exact": Exact(Convention())}

    def found(draws: Draws, seed: int = 0) -> tuple[Tensor, object]:
        torch.manual_seed(torch.seed())
        losses = paired_loss(arms, Clouds(), draws)
        return losses.losses["off"], losses.difference("off", "exact", seed=seed)

    losses, difference = found(FEW)
    again, same = found(FEW)
    assert torch.equal(losses, again) and difference == same
    assert found(FEW, seed=1)[1] != difference
    assert not torch.equal(found(Draws(96, seed=1))[0], losses)
    assert not torch.equal(found(Draws(96, timesteps=LogitNormal()))[0], losses)


def test_training_goes_on_as_if_nothing_had_been_measured() -> None:
    """Modes, gradients, random states and the next step are what they were; its tables serve the backward pass."""

    def stepped(measure: bool) -> tuple[list[Tensor], Tensor, list[bool]]:
        torch.manual_seed(3)
        model = tiny_model().train()
        model.blocks.eval()
        (optimizer, *_) = optimizers_of(model, Settings(steps=2, batch=4, warmup=0))
        samples = Clouds(16, (3, 16, 16))
        for _ in range(2):
            if measure:
                paired_loss({"it": model, "other": tiny_model()}, samples, Draws(8))
            data, cond = samples.batch(torch.arange(4), SampleRNG(0, 0, range(4)))
            loss = Denoising()(model, model, data, cond, SampleRNG(0, 0, range(4)))["loss"]
            loss.backward()
            optimizer.step()
        modes = [module.training for module in model.modules()]
        return [p.detach().clone() for p in model.parameters()], torch.rand(3), modes

    plain, measured = stepped(False), stepped(True)
    assert all(torch.equal(a, b) for a, b in zip(plain[0], measured[0], strict=True))
    assert torch.equal(plain[1], measured[1])
    assert plain[2] == measured[2] and True in plain[2] and False in plain[2]


def test_modes_come_back_after_an_error() -> None:
    model = Exact(Convention()).train()
    with pytest.raises(ShapeError, match=r"\(3, 16, 16\) for 'it', whose samples are \(2, 4, 4\)"):
        paired_loss({"it": model}, Clouds(4, (3, 16, 16)), FEW)
    assert model.training


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    """200 samples of 60 skewed values: a 95 % interval misses some 5 %; 1.5 to 11 % is four standard errors around."""
    generator = torch.Generator().manual_seed(0)
    missed = 0
    for seed in range(200):
        values = torch.rand(60, generator=generator, dtype=torch.float64).log().neg()
        low, high = bootstrap(values, resamples=499, seed=seed)
        missed += not low < 1.0 < high
    assert 3 <= missed <= 22


def test_draws_of_one_sample_count_as_one() -> None:
    """Twelve draws of each of 8 samples are 8 samples, not 96: the interval is that of the samples' means."""
    own = torch.arange(8, dtype=torch.float64) ** 2 / 8  # sums of twelve are exact
    index = torch.arange(96) % 8
    losses = PairedLosses({"it": own[index] + 1, "zero": torch.zeros(96, dtype=torch.float64)}, index)
    low, high = losses.difference("it", "zero").interval
    assert (low, high) == bootstrap(own + 1)
    narrow = bootstrap(own[index] + 1)
    assert high - low > 3 * (narrow[1] - narrow[0])


def test_a_small_set_is_drawn_from_in_turns() -> None:
    samples = Clouds(10)
    losses = paired_loss({"it": Exact(Convention())}, samples, Draws(25), batch_size=8)
    assert torch.cat(samples.asked).tolist() == [n % 10 for n in range(25)] == losses.index.tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_loss({}, Clouds()), "got no models"),
        (lambda: paired_loss({"it": Exact(Convention())}, Clouds(0)), "got no held-out samples"),
        (
            lambda: paired_loss({"it": Exact(Convention())}, Clouds(), target="velocty"),
            "did you mean 'velocity'",
        ),
        (lambda: Draws(count=1), "count=1 should be at least 2"),
        (
            lambda: paired_loss({"a": Exact(Convention()), "b": Exact(Convention("cosine"))}, Clouds()),
            r"different path \(a linear, b cosine\) see different x",
        ),
        (
            lambda: paired_loss(
                {"a": Exact(Convention()), "b": Exact(Convention(prediction="data"))}, Clouds()
            ),
            r"different prediction \(a velocity, b data\) .* target='velocity'",
        ),
        (
            lambda: paired_loss({"a": Exact(DDPM)}, Clouds(), target="velocity"),
            "discrete and has no velocity",
        ),
        (lambda: paired_loss({"a": Exact(Convention())}, Clouds(), FEW).mean("b"), "unknown arm 'b'"),
        (lambda: bootstrap(torch.tensor([1.0])), r"got \(1,\) values"),
        (lambda: bootstrap(torch.tensor([1.0, torch.nan])), "expected two finite ones or more"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()
