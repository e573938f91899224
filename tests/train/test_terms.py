"""Terms with modules, teachers and schedules; adversaries; objectives that remember: resumed and shared to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

SCRIPTS = Path(__file__).parents[1] / "support" / "scripts"
sys.path.insert(0, str(SCRIPTS))

import taught_run  # noqa: E402
from taught_run import ADAPTED, CALLS, POLICY, RUNS, Adversary, Aligned, Represented, run  # noqa: E402
from toy_run import Pictures, losses, settings, toy_model  # noqa: E402

import ditkit  # noqa: E402
from ditkit.core.checkpoint import read_metadata, read_state, write_state  # noqa: E402
from ditkit.core.cond import Cond  # noqa: E402
from ditkit.core.convention import SIT  # noqa: E402
from ditkit.core.errors import CheckpointError, ConfigError  # noqa: E402
from ditkit.train.denoising import Denoising  # noqa: E402
from ditkit.train.loop import Training, train  # noqa: E402
from ditkit.train.schedules import Between, Ramp, weight_at  # noqa: E402
from ditkit.train.settings import Group  # noqa: E402
from ditkit.train.taps import Tap  # noqa: E402
from ditkit.train.teacher import EmaTeacher, GivenTeacher  # noqa: E402
from ditkit.train.terms.distillation import PredictionDistillation  # noqa: E402
from ditkit.train.terms.regression import Regression  # noqa: E402

NAMES = ("aligned", "adversary", "walk", "silent walk", "adapted", "distilled")


def same(a: Path, b: Path) -> bool:
    for name in ("state.safetensors", "model/model.safetensors"):
        one, two = load_file(a / name), load_file(b / name)
        if one.keys() != two.keys() or not all(torch.equal(one[k], two[k]) for k in one):
            return False
    return losses(a) == losses(b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    """Uninterrupted runs of six steps."""
    folders = {}
    for name in (*NAMES, "plain", "zero"):
        CALLS.clear()
        run(folder := tmp_path_factory.mktemp("whole") / "run", name)
        folders[name] = folder
        taught_run.SEEN = {**getattr(taught_run, "SEEN", {}), name: list(CALLS)}
    return folders


@pytest.mark.parametrize("name", NAMES)
def test_killed_and_resumed_it_is_the_uninterrupted_run(whole, tmp_path, name):
    folder, script = (
        tmp_path / "run",
        [sys.executable, str(SCRIPTS / "taught_run.py"), str(tmp_path / "run"), name, "6"],
    )
    if "walk" in name:
        run(folder, name, steps=3)
    else:
        killed = subprocess.run(
            [*script, "--kill", "3"], capture_output=True, text=True, timeout=200, check=False
        )
        assert killed.returncode == -9, killed.stderr
    run(folder, name, resume=True)
    assert same(folder, whole[name])


def test_three_transforms_and_a_policy_survive_a_kill_between_two_states(tmp_path):
    """LoRA, a pruned list and an affine pack: 20 steps, killed in step 13, resumed from 10 by another process."""
    script = [sys.executable, str(SCRIPTS / "taught_run.py")]
    words = ["adapted", "20", "--save-every", "5"]

    def process(folder: Path, *flags: str) -> int:
        done = subprocess.run(
            [*script, str(folder), *words, *flags], capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode in (0, -9), done.stderr
        return done.returncode

    one, two = tmp_path / "whole", tmp_path / "killed"
    run(one, "adapted", steps=20, save_every=5)
    assert process(two, "--kill", "13") == -9 and read_metadata(two / "state.safetensors")["step"] == "10"
    assert process(two, "--resume") == 0
    assert same(one, two)
    models = [ditkit.load(folder / "model") for folder in (one, two)]
    assert models[0].transforms == models[1].transforms == ADAPTED and models[1].policies == (POLICY,)
    outputs = []
    for folder, model in zip((one, two), models, strict=True):
        state = load_file(folder / "state.safetensors")
        copies = [model]
        for i in range(int(read_metadata(folder / "state.safetensors")["averages"])):
            average = {
                k.removeprefix(f"average.{i}."): v for k, v in state.items() if k.startswith(f"average.{i}.")
            }
            held = {**model.state_dict(), **average}
            copies += [model.with_weights(held, "average"), model.sharing(held).eval()]
        outputs.append([drawn_by(copy) for copy in copies])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    (saved, first, shared, *others) = outputs[0]
    assert torch.equal(saved, first) and torch.equal(saved, shared)  # the first average is what is saved
    assert others and not torch.equal(saved, others[0])


def drawn_by(model: Any) -> torch.Tensor:
    return ditkit.generate(model, label=[0, 1], seeds=(0, 1), steps=2, policies=model.policies).samples


def test_weight_zero_changes_no_bit_and_costs_no_call(whole):
    a, b = (load_file(whole[name] / "state.safetensors") for name in ("plain", "zero"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert taught_run.SEEN["zero"] == [] and losses(whole["plain"]) == losses(whole["zero"])
    assert not [name for name in b if name.startswith("part.")]


def test_nothing_is_computed_where_a_schedule_is_zero(whole):
    seen = taught_run.SEEN["aligned"]
    assert [step for step, name in seen if name == "Represented"] == [0, 1, 2, 3]
    assert [step for step, name in seen if name == "Aligned"] == list(range(6))
    state = load_file(whole["aligned"] / "state.safetensors")
    assert "part.Represented.weight" in state and "optimizer.exp_avg.part.Aligned.0.weight" in state
    assert state["optimizer.step.part.Represented.weight"].item() == 4
    assert not [k for k in load_file(whole["aligned"] / "model" / "model.safetensors") if "part" in k]


def test_a_stopped_term_leaves_plain_training_and_lets_its_teacher_go(tmp_path):
    stopped = Denoising((Regression(), Represented(Between(0.5, 0, 2))))
    training = Training(toy_model(SIT), Pictures(), stopped, settings(steps=4), tmp_path)
    training.open({}, False)
    for step in range(4):
        assert bool(training.teachers) == (step < 2)
        training.step()
    assert all(p.grad is None for p in training.modules.parameters())


def test_an_average_that_teaches_shares_its_memory(tmp_path):
    training = Training(
        toy_model(SIT), Pictures(), Denoising((Regression(), Aligned())), settings(steps=4), tmp_path
    )
    training.open({}, False)
    teacher, average = training.teachers["Aligned"], training.averages[1]
    for _ in range(2):
        training.step()
        state = teacher.state_dict()
        assert all(
            torch.equal(state[k], v) and state[k].data_ptr() == v.data_ptr() for k, v in average.state.items()
        )


def test_the_models_loss_gives_its_opponent_no_gradient(whole, tmp_path):
    state = load_file(whole["adversary"] / "state.safetensors")
    assert state["optimizer.step.part.Adversary.0.weight"].item() == 3  # at steps 0, 2 and 4
    frozen = Denoising((Regression(), Adversary(every=100)))
    training = Training(toy_model(SIT), Pictures(), frozen, settings(steps=4), tmp_path)
    training.open({}, False)
    training.step()
    before = {k: v.clone() for k, v in training.modules.state_dict().items()}
    training.step()
    assert all(torch.equal(v, before[k]) for k, v in training.modules.state_dict().items())


def test_adapters_are_saved_without_what_is_frozen(whole):
    folder = whole["adapted"]
    state, frozen = load_file(folder / "state.safetensors"), load_file(folder / "frozen.safetensors")
    held = {name.removeprefix("model.") for name in state if name.startswith("model.")}
    assert held.isdisjoint(frozen) and all("base_layer" not in name for name in held)
    assert {n.removeprefix("average.0.") for n in state if n.startswith("average.0.")} == held
    model = ditkit.load(folder / "model")
    assert model.transforms == ADAPTED and model.policies == (POLICY,)
    assert set(model.state_dict()) == held | set(frozen)
    base = model_before = taught_run.model_of("adapted", False).state_dict()
    assert all(torch.equal(frozen[name], base[name]) for name in frozen)
    assert any(not torch.equal(model.state_dict()[name], model_before[name]) for name in held)
    x = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.7]), Cond(label=torch.tensor([0, 1]))
    again = model.with_weights(model.state_dict(), "copy")
    assert torch.equal(again(*x), model(*x))


def test_groups_have_rates_and_splitting_changes_no_bit(tmp_path):
    groups = (Group("norms", 1.0), Group("attention", 1.0))
    plain, split = (
        train(
            toy_model(SIT, depth=1),
            Pictures(),
            Denoising(),
            settings(steps=2, warmup=0, groups=given),
            tmp_path / str(i),
        )
        for i, given in enumerate(((), groups[1:]))
    )
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), split.parameters(), strict=True))
    objective = Denoising((Regression(), Represented()))
    given = settings(groups=(Group("represented", 10.0, decay=0.5),))
    training = Training(toy_model(SIT), Pictures(), objective, given, tmp_path / "g")
    factors = {group["factor"]: group["weight_decay"] for group in training.optimizers[0].param_groups}
    assert factors == {1.0: 0.0, 10.0: 0.5}
    with pytest.raises(ConfigError, match="unknown part 'norm'"):
        Training(toy_model(SIT), Pictures(), objective, settings(groups=(Group("norm"),)), tmp_path / "n")
    with pytest.raises(ConfigError, match="unknown part 'lora'"):
        Training(toy_model(SIT), Pictures(), objective, settings(trained="lora"), tmp_path / "n")


@pytest.mark.parametrize("name", ["aligned", "adversary", "walk", "distilled"])
def test_two_processes_hold_the_same_weights(whole, tmp_path, name):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = [str(SCRIPTS / "two_ranks.py"), str(tmp_path / "run"), name]
    done = subprocess.run(
        [*launch, *script], capture_output=True, text=True, timeout=300, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    if name != "walk":  # ranks walk trajectories of their own
        for line, other in zip(losses(tmp_path / "run"), losses(whole[name]), strict=False):
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_an_objective_under_way_goes_on_with_as_many_processes(tmp_path):
    run(tmp_path, "walk", steps=3)
    path = tmp_path / "state.safetensors"
    write_state(path, read_state(path), {**read_metadata(path), "processes": "2"})
    with pytest.raises(
        ConfigError, match="its objective is under way on 2 processes; resume it on as many, got 1"
    ):
        run(tmp_path, "walk", steps=4, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: Between(1.0, 5, 5), "first=5 and stop=5, expected steps 0 <= first < stop"),
        (lambda: Ramp(0, 1, 9, 3), "first=9 and stop=3, expected steps 0 <= first < stop"),
        (lambda: Between(-1.0), "value=-1.0, expected a finite number"),
        (
            lambda: Denoising((Regression(Between(1.0, 1, 2)),)).weigh(None),
            "every term has weight 0 at step 0",
        ),
        (lambda: Group("lora", 0.0), "rate=0.0 should be positive"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        change()


def test_schedules_are_what_they_say():
    assert [weight_at(Between(2.0, 1, 3), step) for step in range(4)] == [0, 2, 2, 0]
    assert [weight_at(Ramp(0, 1, 2, 4), step) for step in range(6)] == [0, 0, 0, 0.5, 1, 1]
    assert Between(2.0, 1, 3).ends(3) and not Between(2.0, 1, 3).ends(0)
    assert Ramp(1, 0, 0, 2).ends(2) and not Ramp(0, 1).ends(10**9)


def test_a_teacher_of_another_shape_is_refused_before_the_first_step(tmp_path):
    class Given(PredictionDistillation):
        teacher = GivenTeacher(str(toy_model(SIT, channels=2).save(tmp_path / "teacher")))

    objective = Denoising((Regression(), Given()))
    with pytest.raises(ConfigError, match=r"is of samples \[2, 8, 8\], expected \[1, 8, 8\]"):
        train(toy_model(SIT), Pictures(), objective, settings(), tmp_path / "run")
    late = Denoising((Regression(), Aligned(teacher=EmaTeacher(5))))
    with pytest.raises(ConfigError, match="which=5, expected one of 2 averages"):
        train(toy_model(SIT), Pictures(), late, settings(), tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.json").exists()


def test_a_given_teacher_is_known_by_its_digest(tmp_path):
    folder = toy_model(SIT).save(tmp_path / "teacher")

    class Given(PredictionDistillation):
        teacher = GivenTeacher(str(folder))

    objective = Denoising((Regression(), Given()))
    train(toy_model(SIT), Pictures(), objective, settings(steps=1, warmup=0), tmp_path / "run")
    other = toy_model(SIT)
    with torch.no_grad():
        other.head.out.bias += 1
    other.save(folder)
    with pytest.raises(ConfigError, match=r"teachers\.Given was '.*', now '.*'; a resume needs the same"):
        train(
            toy_model(SIT), Pictures(), objective, settings(steps=2, warmup=0), tmp_path / "run", resume=True
        )


def test_a_resume_under_another_transform_is_refused(whole):
    model = toy_model(SIT, depth=3)
    for transform in (ADAPTED[0], type(ADAPTED[1])(rank=2, alpha=4.0), ADAPTED[2]):
        model.transform(transform)
    with pytest.raises((ConfigError, CheckpointError), match="transforms was"):
        train(
            model.adopt([POLICY]), Pictures(), Denoising(), settings(steps=7), whole["adapted"], resume=True
        )


def test_taps_keep_what_a_site_was_given():
    model, seen = toy_model(SIT).eval(), {}
    names = [
        "blocks.1:in",
        "blocks.0",
        "blocks.1.attn.core:q",
        "blocks.1.attn.core:k",
        "blocks.1.attn.core:v",
    ]
    tap = Tap(names)
    x: Any = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.7]), Cond(label=torch.tensor([0, 1]))
    assert torch.equal(model(*x, tap), model(*x))
    seen = tap.recorded
    assert list(seen) == [
        "blocks.0",
        "blocks.1.attn.core:q",
        "blocks.1.attn.core:k",
        "blocks.1.attn.core:v",
        "blocks.1:in",
    ]
    assert torch.equal(seen["blocks.1:in"], seen["blocks.0"])
    assert seen["blocks.1.attn.core:q"].shape == (2, 2, 16, 16)
    with pytest.raises(ConfigError, match="unknown part 'keys'"):
        Tap(["blocks.0.attn.core:keys"])
    assert RUNS["plain"].describe()["clock"] == {"is": "Independent"}
