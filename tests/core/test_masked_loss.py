"""The loss on what was made only: given content weighs nothing, and what is logged beside it is its own mean."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkit.core.cond import Cond
from ditkit.core.convention import DDPM
from ditkit.core.ddpm import DiscretePath
from ditkit.models.vdt import VDT, VDTConfig
from ditkit.train.denoising import Denoising, NoisyBatch
from ditkit.train.objective import Term
from ditkit.train.taps import Output
from ditkit.train.teacher import Held
from ditkit.train.terms.distillation import PredictionDistillation
from ditkit.train.terms.regression import AbsoluteError, Regression
from ditkit.train.terms.variational_bound import VariationalBound
from models_support import perturbed

TERMS: tuple[Term, ...] = (Regression(), AbsoluteError(), PredictionDistillation(), VariationalBound())
NAMES = [type(term).__name__ for term in TERMS]
B, C, T, SIDE = 3, 2, 4, 4
TIMES = torch.tensor([0, 10, 500])
"""At 0 the bound is the data's likelihood, else a divergence."""


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


DATA, NOISE = random(B, C, T, SIDE, SIDE, seed=0).clamp(-1, 1), random(B, C, T, SIDE, SIDE, seed=1)


def in_part() -> Tensor:
    """Two frames given of the first clip, a region of the second, one cell of the third."""
    mask = torch.ones(B, 1, T, SIDE, SIDE)
    mask[0, :, :2] = mask[1, :, :, :2, 1:] = mask[2, :, 3, 0, 0] = 0
    return mask


@pytest.fixture(scope="module")
def model() -> VDT:
    torch.manual_seed(0)
    config = VDTConfig(C, T, SIDE, patch=2, width=16, depth=1, heads=2)
    return perturbed(VDT(config), 0.1).requires_grad_(False)


def told(mask: Tensor | None) -> Cond:
    label = torch.zeros(B, dtype=torch.long)
    return Cond(label=label) if mask is None else Cond(label=label, context=DATA, mask=mask)


def losses(
    model: VDT, mask: Tensor | None, noise: Tensor = NOISE, terms: tuple[Term, ...] = TERMS
) -> dict[str, Tensor]:
    teacher = model.with_weights({k: 0.9 * v for k, v in model.state_dict().items()}, "teacher")
    path = DiscretePath.linear()
    held = Held(teachers={type(term).__name__: teacher for term in terms})
    return Denoising(terms).at(
        model, model, path=path, data=DATA, noise=noise, t=TIMES, cond=told(mask), held=held
    )


def test_all_to_be_made_is_no_mask_to_the_bit(model: VDT) -> None:
    plain, whole = losses(model, None), losses(model, torch.ones(B, 1, T, SIDE, SIDE))
    assert set(plain) == {*NAMES, "loss"}
    assert {name: whole[name] for name in plain} == plain
    assert all(whole[f"{name}_made"] == plain[name] > 0 for name in NAMES)


def test_all_given_is_nothing_to_learn(model: VDT) -> None:
    found = losses(model, torch.zeros(B, 1, T, SIDE, SIDE))
    assert set(found) == {*NAMES, "loss", *(f"{name}_made" for name in NAMES)}
    assert {value.item() for value in found.values()} == {0.0}


def test_noise_in_the_place_of_given_content_changes_no_bit(model: VDT) -> None:
    made, other = in_part().bool(), random(B, C, T, SIDE, SIDE, seed=2)
    plain = losses(model, in_part())
    assert losses(model, in_part(), torch.where(made, NOISE, other)) == plain
    elsewhere = losses(model, in_part(), torch.where(made, other, NOISE))
    assert all(elsewhere[name] != plain[name] for name in plain)


def of_random(mask: Tensor | None, index: tuple[Tensor, ...] | None = None, sample: int = 0) -> NoisyBatch:
    """A batch of which a network says anything; with `index`, only those elements of one sample, in a line."""
    path = DiscretePath.linear()
    fields: dict[str, Any] = {"data": DATA.double(), "noise": NOISE.double()}
    fields["x"] = path.mix(fields["data"], fields["noise"], TIMES.double())
    fields |= {name: random(*DATA.shape, seed=i).double() for i, name in enumerate(("prediction", "out"), 3)}
    fields["fraction"] = random(*DATA.shape, seed=5).double().sigmoid()
    t = TIMES
    if index is not None:
        fields, t = {name: v[sample][index][None, None] for name, v in fields.items()}, TIMES[[sample]]
    teacher = Output(fields.pop("out"), {})
    return NoisyBatch(path=path, convention=DDPM, t=t, mask=mask, taps={}, taught=teacher, **fields)


@pytest.mark.parametrize("term", TERMS, ids=NAMES)
def test_a_loss_is_that_of_the_made_elements_over_all(term: Term) -> None:
    """Against batches that hold the made elements and nothing else, without a mask."""
    found, made = term.loss(of_random(in_part())), in_part().bool().expand_as(DATA)
    for i, where in enumerate(made):
        alone = term.loss(of_random(None, where.nonzero(as_tuple=True), i))
        torch.testing.assert_close(found[i], alone[0] * where.float().mean())


def said(model: VDT) -> NoisyBatch:
    """What the network says where content is given, with all of it counting."""
    path = DiscretePath.linear()
    x = path.mix(DATA, NOISE, TIMES.float())
    prediction, fraction = DDPM.split(model(x, TIMES.float(), told(in_part())))
    return NoisyBatch(
        path=path, convention=DDPM, data=DATA, noise=NOISE, x=x, t=TIMES, prediction=prediction,
        fraction=fraction, taps={},
    )  # fmt: skip


def test_what_is_logged_as_made_is_the_mean_over_what_was_made(model: VDT) -> None:
    found, batch = losses(model, in_part()), said(model)
    off = (NOISE - batch.prediction)[in_part().bool().expand_as(DATA)]
    torch.testing.assert_close(found["Regression_made"], off.square().mean())
    torch.testing.assert_close(found["AbsoluteError_made"], off.abs().mean())
    masked = replace(batch, mask=in_part())
    bound = VariationalBound().loss(masked).sum() / in_part().flatten(1).mean(1).sum()
    torch.testing.assert_close(found["VariationalBound_made"], bound)


def test_on_given_learns_the_variance_everywhere_and_logs_no_mean_over_what_was_made(model: VDT) -> None:
    both = Regression(), VariationalBound(on_given=True)
    found, batch = losses(model, in_part(), terms=both), said(model)
    assert set(found) == {"Regression", "VariationalBound", "loss", "Regression_made"}
    assert found["VariationalBound"] == VariationalBound().loss(batch).mean()
    assert found["VariationalBound"] != losses(model, in_part())["VariationalBound"]
    assert found["Regression"] == losses(model, in_part())["Regression"]
    assert found["loss"] == found["Regression"] + found["VariationalBound"]
    unseen = losses(model, torch.zeros(B, 1, T, SIDE, SIDE), terms=both)
    assert unseen["loss"] == unseen["VariationalBound"] > 0
