"""Muon for the matrices of the blocks, AdamW for the rest: who steps what, how far, and across a stop."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ditkit.cli.main import main
from ditkit.core.errors import CheckpointError, ConfigError
from ditkit.models.convlstm import ConvLSTM, ConvLSTMConfig
from ditkit.recipes.predformer import predformer
from ditkit.train.loop import train
from ditkit.train.optimizers import matrices, optimizers_of
from ditkit.train.settings import Settings
from scripts.toy_run import DIFFUSION, Pictures, losses, settings, toy_model, toy_run

MUON = Settings(optimizer="muon", learning_rate=1e-2, weight_decay=0.1)
RISE = (3.4445, -4.775, 2.0315)
"""The odd polynomial of degree 5 that Muon applies five times to a matrix's singular values."""


def test_every_weight_has_one_optimiser_and_only_matrices_of_blocks_are_muons():
    model = toy_model()
    of_muon, of_adamw = (
        [weight for group in optimizer.param_groups for weight in group["params"]]
        for optimizer in optimizers_of(model, MUON)
    )
    assert len(of_muon + of_adamw) == len(set(of_muon) | set(of_adamw)) == len(list(model.parameters()))
    names = {name for name, weight in model.named_parameters() if weight in set(of_muon)}
    assert names == {
        f"blocks.{i}.{layer}.weight"
        for i in range(2)
        for layer in ("attn.qkv", "attn.out", "mlp.inner", "mlp.outer", "modulation")
    }
    assert [type(o).__name__ for o in optimizers_of(model, Settings())] == ["AdamW"]


def test_a_step_of_muon_is_the_polynomial_of_its_singular_values():
    """The twin goes through the singular value decomposition, in float64."""
    model = toy_model()
    muon, _ = optimizers_of(model, MUON)
    weight = matrices(model)[0]
    before, gradient = weight.detach().double().clone(), torch.randn(weight.shape, dtype=torch.float64)
    weight.grad = gradient.float()
    muon.step()
    u, s, v = torch.linalg.svd(gradient, full_matrices=False)
    s = s / s.norm()  # the momentum's size does not matter
    for _ in range(5):
        s = RISE[0] * s + RISE[1] * s**3 + RISE[2] * s**5
    step = 0.2 * max(weight.shape) ** 0.5 * (u * s) @ v  # Moonlight's scale
    wanted = before * (1 - 1e-2 * 0.1) - 1e-2 * step
    found = weight.detach().double()
    assert (found - wanted).norm() < 0.02 * (wanted - before).norm()  # torch iterates in bfloat16
    assert 0.15 < (found - before).square().mean().sqrt() / 1e-2 < 0.3  # AdamW's usual 0.2 to 0.4


def test_a_run_of_muon_goes_on_as_if_it_had_not_stopped(tmp_path):
    toy_run(tmp_path / "whole", optimizer="muon", steps=12)
    toy_run(tmp_path / "cut", optimizer="muon", steps=5)
    toy_run(tmp_path / "cut", optimizer="muon", steps=12, resume=True)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    one, two = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "cut"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert "optimizer.momentum_buffer.blocks.0.mlp.inner.weight" in one
    assert "optimizer.exp_avg.blocks.0.mlp.inner.weight" not in one


def test_muon_learns_the_toy(tmp_path):
    toy_run(tmp_path, optimizer="muon", steps=40)
    lines = [line["loss"] for line in losses(tmp_path)]
    assert sum(lines[-5:]) < 0.8 * sum(lines[:5])


def test_a_resume_under_the_other_optimiser_is_refused(tmp_path):
    toy_run(tmp_path, steps=4)
    with pytest.raises(ConfigError, match=r"settings.optimizer was 'adamw', now 'muon'"):
        toy_run(tmp_path, steps=6, resume=True, optimizer="muon")


def test_moments_of_the_other_optimiser_are_refused_by_their_name(tmp_path):
    toy_run(tmp_path, steps=4, optimizer="muon")
    path = tmp_path / "state.safetensors"
    state, name = load_file(path), "blocks.1.attn.qkv.weight"
    state[f"optimizer.exp_avg.{name}"] = state.pop(f"optimizer.momentum_buffer.{name}")
    save_file(state, path, {"step": "4", "averages": "2"})
    with pytest.raises(CheckpointError, match=rf"missing tensor 'optimizer.momentum_buffer.{name}'"):
        toy_run(tmp_path, steps=6, resume=True, optimizer="muon")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_weight_that_lost_all_its_moments_is_noticed(tmp_path, optimizer):
    toy_run(tmp_path, steps=4, optimizer=optimizer)
    path, name = tmp_path / "state.safetensors", "blocks.1.attn.qkv.weight"
    with safe_open(path, "pt") as opened:
        about = opened.metadata()
    state = load_file(path)
    gone = [key for key in state if key.startswith("optimizer.") and key.endswith(name)]
    save_file({key: value for key, value in state.items() if key not in gone}, path, about)
    left = int(about["moments"]) - len(gone)
    with pytest.raises(CheckpointError, match=rf"holds {left} moments of {about['moments']}"):
        toy_run(tmp_path, steps=6, resume=True, optimizer=optimizer)


def test_moments_of_another_type_are_refused(tmp_path):
    toy_run(tmp_path, steps=4, optimizer="muon")
    path, name = tmp_path / "state.safetensors", "optimizer.momentum_buffer.blocks.1.attn.qkv.weight"
    state = load_file(path)
    save_file({**state, name: state[name].half()}, path, {"step": "4", "averages": "2"})
    with pytest.raises(CheckpointError, match=rf"'{name}' is torch.float16, expected torch.float32"):
        toy_run(tmp_path, steps=6, resume=True, optimizer="muon")


@pytest.mark.usefixtures("drawn_digits")
def test_a_dry_run_knows_what_muon_keeps_and_refuses(capsys):
    """One number of a matrix instead of two."""
    kept = {}
    for optimizer in ("adamw", "muon"):
        main(["train", "predformer", "--optimizer", optimizer, "--dry-run"])
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("state"))
        kept[optimizer] = float(line.split()[1])
    with torch.device("meta"):
        spared = 4 * sum(weight.numel() for weight in matrices(predformer().network())) / 1e6
    assert kept["adamw"] - kept["muon"] == pytest.approx(spared, abs=0.11)
    assert main(["train", "convlstm", "--optimizer", "muon", "--dry-run"]) == 2
    assert "a ConvLSTM has none" in capsys.readouterr().err


def test_frozen_matrices_are_left_alone(tmp_path):
    start = {name: weight.clone() for name, weight in toy_model().state_dict().items()}
    given = settings(steps=4, optimizer="muon", trained="attention", weight_decay=0.1)
    model = toy_model()
    train(model, Pictures(), DIFFUSION, given, tmp_path)
    moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, start[name])}
    assert {name.split(".")[2] for name in moved} == {"attn"}


def test_a_network_without_matrices_in_blocks_is_refused():
    network = ConvLSTM(ConvLSTMConfig(frames=2, size=(8, 8), patch=4, states=(4,)))
    with pytest.raises(
        ConfigError, match=r"optimizer='muon' is for linear layers in blocks; a ConvLSTM has none"
    ):
        optimizers_of(network, MUON)


def test_an_unknown_optimiser_is_refused():
    with pytest.raises(ConfigError, match="muonn"):
        Settings(optimizer="muonn")  # type: ignore[arg-type]
