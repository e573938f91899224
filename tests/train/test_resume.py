"""A run that is killed goes on as if nothing had happened; a run that is not the same is refused."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ditkit.core.convention import Convention
from ditkit.core.errors import CheckpointError, ConfigError, DitkitError
from ditkit.train.ema import Constant, Power
from ditkit.train.log import keep_until
from ditkit.train.loop import train
from scripts.toy_run import DIFFUSION, FLOW, Pictures, losses, settings, toy_model, toy_run

SCRIPTS = Path(__file__).parents[1] / "support" / "scripts"


pytestmark = pytest.mark.usefixtures("interruptible")


def same_tensors(a: Path, b: Path) -> bool:
    one, two = load_file(a), load_file(b)
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def same_run(a: Path, b: Path) -> bool:
    """Losses, final state (weights, averages, moments) and shipped model, bit for bit."""
    files = ("state.safetensors", "model/model.safetensors")
    return losses(a) == losses(b) and all(same_tensors(a / f, b / f) for f in files)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run of 20 steps."""
    folder = tmp_path_factory.mktemp("whole")
    toy_run(folder)
    return folder


def test_killed_again_and_again_it_gives_the_same_run(tmp_path):
    script = [sys.executable, str(SCRIPTS / "kill_and_resume.py"), str(tmp_path / "killed"), "6", "0"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr + (tmp_path / "killed.txt").read_text()
    assert int(done.stdout) >= 2  # of the three kills aimed at a state being written
    toy_run(tmp_path / "whole", steps=60)
    assert same_run(tmp_path / "killed", tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob(".*"))


def test_a_longer_run_goes_on_from_a_finished_one(whole, tmp_path):
    toy_run(tmp_path, steps=9)
    toy_run(tmp_path, steps=20, resume=True)
    assert same_run(tmp_path, whole)


def test_before_the_first_saved_state_a_resume_begins_anew(whole, tmp_path):
    toy_run(tmp_path, save_every=0)
    toy_run(tmp_path, resume=True)
    assert same_run(tmp_path, whole)


def test_resuming_a_finished_run_changes_nothing(whole, tmp_path):
    toy_run(tmp_path)
    toy_run(tmp_path, resume=True)
    assert same_run(tmp_path, whole)


def test_snapshots_and_sheets_of_a_resumed_run_are_those_of_a_whole_one(tmp_path):
    def run(folder: Path, steps: int, resume: bool = False) -> list[int]:
        sheets: list[int] = []
        given = settings(steps=steps, snapshot_every=4, sheet_every=5, save_every=6)
        sheet = lambda model, step: sheets.append(step)  # noqa: E731
        train(toy_model(), Pictures(), DIFFUSION, given, folder, resume=resume, sheet=sheet)
        return sheets

    assert run(tmp_path / "whole", 12) == [5, 10, 12]
    run(tmp_path / "cut", 7)
    assert run(tmp_path / "cut", 12, resume=True) == [10, 12]
    names = [p.name for p in sorted((tmp_path / "whole/snapshots").iterdir())]
    assert names == [f"{step:08d}-0.100.safetensors" for step in (4, 8, 12)]  # the constant average has none
    assert all(same_tensors(tmp_path / "cut/snapshots" / n, tmp_path / "whole/snapshots" / n) for n in names)


def test_a_line_cut_short_and_lines_done_again_are_dropped(tmp_path):
    path = tmp_path / "losses.jsonl"
    whole = [json.dumps({"step": step, "loss": 0.5}) + "\n" for step in (1, 2, 3, 4)]
    for cut in ("", '{"step": 5, "lo', '{"step": 5, "loss": 1}', "\0\0\0"):
        path.write_text("".join(whole) + cut)
        keep_until(path, 9)
        assert path.read_text() == "".join(whole)
    keep_until(path, 2)
    assert path.read_text() == "".join(whole[:2])
    keep_until(tmp_path / "none.jsonl", 2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch": 4}, r"settings.batch was 8, now 4; a resume needs the same"),
        ({"seed": 1}, r"settings.seed was 0, now 1"),
        ({"learning_rate": 1e-3}, r"settings.learning_rate was 0.002, now 0.001"),
        ({"averages": (Constant(0.9),)}, r"settings.averages was \[\{'std': 0.1\}, \{'decay': 0.9\}\], now"),
        ({"averages": (Power(0.1), Power(0.05))}, r"settings.averages"),
        ({"precision": "bf16"}, r"settings.precision was 'float32', now 'bf16'"),
        ({"steps": 19}, r"has done 20 steps, more than steps=19"),
    ],
)
def test_resuming_with_other_settings_is_refused(whole, changed, message):
    before = (whole / "recipe.json").read_bytes()
    with pytest.raises(ConfigError, match=message) as caught:
        toy_run(whole, resume=True, **changed)
    assert "\n" not in str(caught.value)
    assert (whole / "recipe.json").read_bytes() == before


def test_resuming_with_another_model_objective_or_set_is_refused(whole):
    class Fewer(Pictures):
        def __len__(self) -> int:
            return 39

    given = settings()
    with pytest.raises(ConfigError, match=r"model.width was 32, now 64"):
        train(toy_model(width=64), Pictures(), DIFFUSION, given, whole, resume=True)
    with pytest.raises(ConfigError, match=r"model.convention was \{'extra': 'variance'.*now"):
        train(toy_model(Convention()), Pictures(), FLOW, given, whole, resume=True)
    with pytest.raises(ConfigError, match=r"terms was .*VariationalBound.*, now"):
        train(toy_model(), Pictures(), FLOW, given, whole, resume=True)
    with pytest.raises(ConfigError, match=r"samples was 40, now 39"):
        train(toy_model(), Fewer(), DIFFUSION, given, whole, resume=True)


def test_what_changes_no_result_may_change(whole, tmp_path):
    toy_run(tmp_path, steps=10)
    toy_run(tmp_path, resume=True, gradient_checkpointing=True, save_every=7)
    assert losses(tmp_path) == losses(whole)


def test_starting_anew_over_a_run_is_refused(whole):
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=r"already holds a run; resume it, or choose another folder"):
        toy_run(whole, seed=3)
    assert {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()} == before


def test_resuming_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no run to resume: there is no recipe.json"):
        toy_run(tmp_path, resume=True)
    assert not list(tmp_path.iterdir())


def test_damaged_states_are_refused_and_left_alone(tmp_path):
    toy_run(tmp_path, steps=4)
    state = tmp_path / "state.safetensors"
    for damage in (state.read_bytes()[:-100], b"", b"\x80\x04."):
        state.write_bytes(damage)
        with pytest.raises(CheckpointError, match=r"state.safetensors"):
            toy_run(tmp_path, steps=6, resume=True)
        assert state.read_bytes() == damage
    assert len(losses(tmp_path)) == 4


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("average.0.head.out.bias", lambda v: v[:1], r"has shape \[1\], expected \[8\]"),
        ("average.1.head.out.bias", lambda v: v * float("nan"), "holds NaN or infinity"),
        ("optimizer.exp_avg.head.out.bias", lambda v: v[None], r"has shape \[1, 8\], expected \[8\]"),
        ("optimizer.exp_avg_sq.head.out.bias", lambda v: v + float("inf"), "holds NaN or infinity"),
        ("optimizer.step.head.out.bias", lambda v: v[None], r"has shape \[1\], expected \[\]"),
        ("optimizer.exp_avg_sq.head.out.bias", None, "missing tensor"),
    ],
)
def test_a_state_with_one_wrong_tensor_is_refused_by_its_name(whole, tmp_path, name, change, message):
    state = load_file(whole / "state.safetensors")
    value = state.pop(name)
    if change is not None:
        state[name] = change(value).contiguous()
    save_file(state, tmp_path / "state.safetensors", {"step": "20", "averages": "2"})
    (tmp_path / "recipe.json").write_bytes((whole / "recipe.json").read_bytes())
    with pytest.raises(CheckpointError, match=message) as caught:
        toy_run(tmp_path, resume=True)
    assert repr(name) in str(caught.value)


OURS = (".state.safetensors.ab_d3f9h", ".tmpAb12Cd", "model/.model.safetensors.aaaaaaaa")
OURS += ("snapshots/.00000004-0.100.safetensors.12345678",)
THEIRS = (".mine.safetensors.aaaaaaaa", ".state.safetensors.bak", ".tmp-notes", "photos/.tmpAb12Cd")
THEIRS += ("samples/.state.safetensors.ab_d3f9h", ".tmpabcdef/file")


def test_only_a_resume_removes_drafts_and_only_ours(tmp_path):
    for name in OURS + THEIRS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    toy_run(tmp_path, steps=4, save_every=4)
    assert [name for name in OURS + THEIRS if not (tmp_path / name).exists()] == []
    toy_run(tmp_path, steps=5, resume=True)
    assert [name for name in OURS if (tmp_path / name).exists()] == []
    assert [name for name in THEIRS if not (tmp_path / name).exists()] == []


class Interrupted(Pictures):
    """Ctrl-C while step 5 gathers its batch, so many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times, self.batches = times, 0

    def batch(self, indices, chance):
        self.batches += 1
        for _ in range(self.times if self.batches == 5 else 0):
            signal.raise_signal(signal.SIGINT)
        return super().batch(indices, chance)


@pytest.mark.parametrize(
    ("times", "save_every", "said"),
    [
        (1, 100, "the state of step 5 is saved in"),
        (2, 2, "the state of step 4 is saved in"),
        (1, 0, "no state is saved in"),
        (2, 100, "no state is saved in"),
    ],
)
def test_an_interrupted_run_says_what_is_saved_and_goes_on(whole, tmp_path, times, save_every, said):
    with pytest.raises(KeyboardInterrupt, match=said):
        train(toy_model(), Interrupted(times), DIFFUSION, settings(save_every=save_every), tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert (tmp_path / "state.safetensors").exists() == (not said.startswith("no"))
    toy_run(tmp_path, resume=True)
    assert same_run(tmp_path, whole)


def test_an_interrupt_in_the_last_step_lets_it_end(tmp_path):
    train(toy_model(), Interrupted(1), DIFFUSION, settings(steps=5), tmp_path)
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_what_is_due_never_is_not_due_at_the_end(tmp_path):
    sheets = []
    given = settings(steps=4, save_every=0, sheet_every=0, snapshot_every=0)
    train(toy_model(), Pictures(), DIFFUSION, given, tmp_path, sheet=lambda *drawn: sheets.append(drawn))
    assert sheets == [] and not (tmp_path / "snapshots").exists()
    assert not (tmp_path / "state.safetensors").exists()


@contextmanager
def small_disk() -> Iterator[Callable[[int], None]]:
    """Gives a function after whose call no file may grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_full_in_the_middle_of_a_state(whole, tmp_path):
    """After step 7 no file grows beyond 64 KB; a state takes 300, and the one of step 6 is there."""
    message = r"cannot write .*state.safetensors: .*nothing was changed"
    with small_disk() as limit, pytest.raises(ConfigError, match=message) as caught:
        fill = lambda model, step: limit(65_536) if step == 7 else None  # noqa: E731
        train(toy_model(), Pictures(), DIFFUSION, settings(sheet_every=1), tmp_path, sheet=fill)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob(".*"))
    toy_run(tmp_path, resume=True)
    assert same_run(tmp_path, whole)


def test_disk_full_while_logging(tmp_path, monkeypatch):
    """Without TensorBoard, whose own thread would complain of the same."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    given = settings(sheet_every=1, save_every=0)
    with small_disk() as limit, pytest.raises(ConfigError, match=r"cannot write in .*: File too large"):
        train(toy_model(), Pictures(), DIFFUSION, given, tmp_path, sheet=lambda model, step: limit(300))


def test_a_loss_that_is_no_number_stops_the_run_with_its_state_intact(whole, tmp_path):
    class Poisoned(Pictures):
        batches = 0

        def batch(self, indices, chance):
            data, cond = super().batch(indices, chance)
            self.batches += 1
            return (data * float("nan") if self.batches == 8 else data), cond

    with pytest.raises(DitkitError, match=r"loss is nan at step 8; the last saved state is intact"):
        train(toy_model(), Poisoned(), DIFFUSION, settings(), tmp_path)
    assert len(losses(tmp_path)) == 7
    toy_run(tmp_path, resume=True)
    assert same_run(tmp_path, whole)
