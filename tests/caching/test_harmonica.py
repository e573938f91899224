"""HarmoniCa: soft and hard tables, the training and its proxy, and tables of another model or schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
)
from torch import Tensor, nn

import ditkit
from ditkit.api.harmonise import Drawn, Harmonising, ModelProcess, Process, Router, Training, harmonise
from ditkit.api.harmonise_pixart import PixArtProcess, harmonise_pixart
from ditkit.attention import Neighbourhood
from ditkit.bench.macs import MacCounter
from ditkit.caching import HarmoniCa, TaylorSeer
from ditkit.caching.harmonica import CacheTable, Mixed, Reused, branch_digest, chosen, uniform
from ditkit.cli.main import main
from ditkit.compress import DyDiT
from ditkit.core.cond import Cond
from ditkit.core.errors import CheckpointError, ConfigError, ConflictError, NoEffectError
from ditkit.core.run import Call, Run, Site
from ditkit.core.trajectory import Trajectory
from ditkit.models.dit import DiT
from ditkit.models.text_dit import TextDiT, TextDiTConfig
from ditkit.sample import ClassifierFree, Ddim, Unguided
from ditkit.sample.sampler import Sampling
from ditkit.sample.solvers import Ancestral, Euler, Heun
from pipelines_support import pixart
from rig import call_at, tiny_dit

STEPS, BRANCHES = 4, 6
SAMPLING = Sampling(steps=STEPS, guidance=ClassifierFree(1.5), batch_size=2)
QUICK = Harmonising(trajectories=2, batch=2, refresh=1, rate=0.5, beta=1e-3)


def training(**changed: Any) -> Training:
    settings = replace(QUICK, **changed)
    model = tiny_dit().requires_grad_(False)
    return Training(ModelProcess(model, SAMPLING.changed(batch_size=settings.batch)), settings)


def played(found: Training, rates: list[Tensor | None]) -> tuple[list[Tensor], Mixed]:
    """The latents after each step of a soft trajectory."""
    session, state, states = found._session(), found.process.start(0), []
    with torch.no_grad():
        for index, rate in enumerate(rates):
            state = found.process.step(state, index, found._predict(state, index, session, rate))
            states.append(found.process.latents(state))
    return states, session


def drawn(model: Any, *policies: Any, steps: int = STEPS) -> Tensor:
    found: Tensor = ditkit.generate(model, [0, 1], seeds=(0, 1), steps=steps, policies=policies).samples
    return found


def test_rates_of_one_are_the_full_network_to_the_bit() -> None:
    found = training()
    ones: list[Tensor | None] = [torch.ones(BRANCHES)] * STEPS
    assert torch.equal(played(found, ones)[0][-1], played(found, [None] * STEPS)[0][-1])
    found.router.rates = lambda: [torch.ones(BRANCHES)] * STEPS  # type: ignore[method-assign]
    assert found.proxies(found.process.start(0)) == [0.0] * STEPS
    row = nn.Parameter(torch.full((BRANCHES,), 50.0))  # sigmoid is 1 in float32
    found.router.rows = [row, row, row]
    for lesson in found.trajectory(found.process.start(0)):
        assert lesson.error == 0 and lesson.loss == pytest.approx(1e-3 * BRANCHES)
        row.data.fill_(50.0)


def test_tables_of_all_and_of_the_first_step_alone() -> None:
    model = tiny_dit()
    assert torch.equal(drawn(model, HarmoniCa(rows=("1",))), drawn(model))
    with pytest.raises(NoEffectError, match="saved nothing"):
        drawn(model, HarmoniCa(rows=("1" * BRANCHES,)))
    once = HarmoniCa(rows=("1", "0", "0", "0"))
    kept: dict[tuple[str, str], Tensor] = {}

    class Once(Run):
        lane = ""

        def site(self, name: str, fn: Callable[..., Any], *args: Any) -> Any:
            if not name.endswith((".attn", ".mlp")):
                return fn(*args)
            key = (self.lane, name)
            if key not in kept:
                kept[key] = fn(*args)
            return kept[key]

    run, forward = Once(), model.forward

    def told(x: Tensor, t: Tensor, cond: Cond, _: Any = None) -> Tensor:
        assert cond.label is not None
        run.lane = "uncond" if (cond.label == 4).all() else "cond"
        return forward(x, t, cond, run)

    found = drawn(model, once)
    model.forward = told  # type: ignore[method-assign]
    assert torch.equal(drawn(model), found)


def test_soft_rates_of_zero_and_one_are_the_hard_table() -> None:
    """With what is kept after every step: this finds an update on the wrong side of the threshold."""
    found = training()
    g = torch.Generator().manual_seed(3)
    rates = [torch.ones(BRANCHES), *(torch.randint(2, (BRANCHES,), generator=g).float() for _ in range(3))]
    rows = ["".join(str(int(r)) for r in row) for row in rates]
    hard, soft = Reused(found.branches, rows), found._session()
    states: list[Drawn] = [found.process.start(0)] * 2  # type: ignore[list-item]
    process: Any = found.process
    with torch.no_grad():
        for index, rate in enumerate(rates):

            def run(call: Call) -> Run:
                return Run(hard.enter(call))

            outs = process.predict(states[0], index, run), found._predict(states[1], index, soft, rate)
            hard.commit()
            assert torch.allclose(*outs, atol=1e-5)
            for key, value in hard.state.items():
                if isinstance(value, Tensor):
                    assert torch.allclose(value, soft.state[key], atol=1e-5)
            kept = {key[2] for key, value in hard.state.items() if isinstance(value, Tensor)}
            later = rows[index + 1] if index + 1 < STEPS else "1" * BRANCHES
            assert kept == {name for name, letter in zip(found.branches, later, strict=True) if letter == "0"}
            states = [process.step(state, index, out) for state, out in zip(states, outs, strict=True)]


class Toy(Process):
    """One branch a step, b(t) = values[t], that is added to x at the steps that matter."""

    def __init__(self, values: list[float], gains: list[float]) -> None:
        self.values, self.gains = values, gains
        self.times = [1 - i / len(values) for i in range(len(values))]
        self.sampler, self.sites = "toy", (Site("b", "branch"),)

    def start(self, number: int) -> Tensor:
        return torch.zeros(1, 1, dtype=torch.float64)

    def predict(self, state: Tensor, index: int, run: Callable[[Call], Run]) -> Tensor:
        call = Call(index, len(self.times), self.times[index])
        fresh = state.new_full((1, 1), self.values[index])
        out: Tensor = self.gains[index] * run(call).site("b", lambda x: fresh, state)
        return out

    def step(self, state: Tensor, index: int, out: Tensor) -> Tensor:
        return state + out

    def latents(self, state: Tensor) -> Tensor:
        return state


def test_the_gradient_of_one_branch() -> None:
    """dL/dp = r (1 - r) (lambda 2 gain^2 (r a + (1 - r) c - a) (a - c) + beta), and central differences of it."""
    a, c, gain, beta = 3.0, 1.0, 0.7, 0.05
    found = Training(Toy([c, a], [gain, gain]), replace(QUICK, beta=beta, proxy="none"))
    row = found.router.rows[0] = nn.Parameter(torch.tensor([0.3], dtype=torch.float64))
    found.optimizer = torch.optim.SGD([row], lr=0.0)
    (lesson,) = found.trajectory(found.process.start(0))
    r = torch.tensor(0.3, dtype=torch.float64).sigmoid().item()
    expected = r * (1 - r) * (2 * gain**2 * (r * a + (1 - r) * c - a) * (a - c) + beta)
    assert row.grad is not None and row.grad.item() == pytest.approx(expected, rel=1e-9)

    def loss(p: float) -> float:
        row.data.fill_(p)
        (lesson,) = found.trajectory(found.process.start(0))
        return lesson.loss

    assert (loss(0.3 + 1e-5) - loss(0.3 - 1e-5)) / 2e-5 == pytest.approx(expected, rel=1e-6)
    assert lesson.index == 1


def test_the_weights_of_the_network_get_no_gradient() -> None:
    model = tiny_dit()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    found = harmonise(model, SAMPLING, QUICK)
    assert model.training and all(w.requires_grad and w.grad is None for w in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert found.times == pytest.approx((1.0, 0.75, 0.5, 0.25)) and len(found.rows) == STEPS


def test_the_proxy_is_of_the_step_that_matters() -> None:
    """Incremental and isolated: only the step whose branch changes what is drawn has a weight."""
    for k in (1, 2, 3):
        gains = [0.0] * 4
        gains[k] = 1.0
        for proxy in ("incremental", "isolated"):
            found = Training(Toy([1.0, 2.0, 4.0, 8.0], gains), replace(QUICK, proxy=proxy))  # type: ignore[arg-type]
            weights = found.proxies(found.process.start(0))
            assert [i for i, w in enumerate(weights) if w > 0] == [k]


def test_incremental_weights_add_up_where_isolated_ones_do_not() -> None:
    """With rows that all matter the two differ: the later row finds what the earlier ones kept."""
    both = []
    for proxy in ("incremental", "isolated"):
        found = Training(Toy([1.0, 2.0, 4.0, 8.0], [1.0] * 4), replace(QUICK, proxy=proxy))  # type: ignore[arg-type]
        for row in found.router.rows:
            row.data.fill_(-5.0)
        both.append(found.proxies(found.process.start(0)))
    assert both[0][1] == pytest.approx(both[1][1]) and both[0][2] > 2 * both[1][2]


def test_a_dear_branch_is_reused_and_a_free_one_computed() -> None:
    dear = training(trajectories=12, beta=1e6, rate=2.0, proxy="none")
    dear.run()
    assert all((row == -5).all() for row in dear.router.rows)
    assert dear.rates()[1:].max() < 0.1 and dear.rates().min() >= torch.tensor(-5.0).sigmoid()
    free = training(trajectories=8, beta=0.0, rate=1.0, proxy="none")
    for row in free.router.rows:
        row.data.zero_()
    free.run()
    assert free.rates()[1:].mean() > 0.6


def test_parameters_are_the_rows_but_the_first() -> None:
    router = Router(10, 56)
    assert sum(row.numel() for row in router.rows) == 504 and len(router.rates()) == 10
    assert not router.first.requires_grad and router.rates()[0][0].item() == pytest.approx(0.9933, abs=1e-4)
    again = Router(10, 56)
    assert all(torch.equal(a, b) for a, b in zip(router.rows, again.rows, strict=True))
    found = training()
    before = [row.clone() for row in found.router.rows]
    next(iter(found.trajectory(found.process.start(0))))
    changed = [not torch.equal(a, b) for a, b in zip(before, found.router.rows, strict=True)]
    assert changed == [True, False, False]


def test_equal_numbers_of_computed_branches() -> None:
    rates = torch.rand(5, 6, generator=torch.Generator().manual_seed(0))
    for count in (6, 13, 30):
        rows = chosen(rates, count)
        assert sum(row.count("1") for row in rows) == count and rows[0] == "1" * 6
    assert uniform(4) == ("1", "0", "1", "0")
    with pytest.raises(ConfigError, match="count=5 of 5 x 6 branches, expected 6 to 30"):
        chosen(rates, 5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[DiT, Path]:
    """A model, and a table that was trained on it."""
    folder = tmp_path_factory.mktemp("harmonica")
    tiny_dit().save(folder / "model")
    model: Any = ditkit.load(folder / "model")
    table = harmonise(model, Sampling(steps=STEPS, guidance=2.0), QUICK)
    rows = (table.rows[0], "0" * BRANCHES, *table.rows[2:])  # so that something is reused
    return model, replace(table, rows=rows).save(folder / "table.json")


def test_a_table_is_used_by_its_file_and_by_its_rows(saved: tuple[DiT, Path]) -> None:
    model, path = saved
    by_file, by_rows = HarmoniCa(table=str(path)), HarmoniCa(rows=CacheTable.load(path).rows)
    assert torch.equal(drawn(model, by_file), drawn(model, by_rows))
    samples = ditkit.generate(model, [0, 1], seeds=(0, 1), steps=STEPS, policies=[by_file])
    assert samples.receipts[0].saved >= 2 * BRANCHES
    with MacCounter() as counter:
        drawn(model, by_file)
    with MacCounter() as whole:
        drawn(model)
    assert counter.total < whole.total


def refused(saved: tuple[DiT, Path], message: str, model: Any = None, **changed: Any) -> None:
    """Nothing is computed before the refusal."""
    network: Any = saved[0] if model is None else model
    called: list[int] = []
    handle = network.register_forward_hook(lambda *_: called.append(1))
    options = {"steps": STEPS, **changed}
    try:
        with pytest.raises(ConfigError, match=message) as error:
            ditkit.generate(network, [0], seeds=(0,), policies=[HarmoniCa(table=str(saved[1]))], **options)
    finally:
        handle.remove()
    assert not called and "\n" not in str(error.value)


def test_a_table_of_anything_else_is_refused_before_the_first_step(saved: tuple[DiT, Path]) -> None:
    refused(saved, "is of 4 evaluations, got 6; train again", steps=6)
    refused(saved, r"was trained for Euler\(.*got Ddim", solver=Ddim())
    shifted = Euler(grid=ditkit.core.time_grid.Shift(3.0))  # type: ignore[attr-defined]
    refused(saved, r"was trained for Euler\(.*got Euler\(", solver=shifted)
    refused(saved, "was trained on weights .*got .*weights=any", model=tiny_dit(seed=1))
    deeper = DiT(replace(saved[0].config, depth=2)).eval()
    refused(saved, "is of DiT with 6 branches, got others: 4", model=deeper)
    times = [0.9, 0.75, 0.5, 0.25]
    with pytest.raises(ConfigError, match=r"evaluation 0 at t=1.0000, got 0.9000"):
        HarmoniCa(table=str(saved[1])).check_schedule(times, CacheTable.load(saved[1]).sampler)
    assert drawn(tiny_dit(seed=1), HarmoniCa(table=str(saved[1]), weights="any")).isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (HarmoniCa, "expected one of table=FILE and rows="),
        (lambda: HarmoniCa(rows=("10", "111")), "expected words of one length"),
        (lambda: HarmoniCa(rows=("12",)), "expected letters of 1"),
        (lambda: HarmoniCa(rows=("10",)).start(tiny_dit().sites(), 4), "has 2 letters, the model 6 branches"),
        (lambda: Harmonising(threshold=0.001), "threshold=0.001, expected it between"),
        (lambda: Harmonising(beta=-1.0), "beta=-1.0"),
        (lambda: ModelProcess(tiny_dit(), SAMPLING.changed(solver=Heun())), "one evaluation a step"),
        (lambda: Training(ModelProcess(tiny_dit(), SAMPLING.changed(steps=1)), QUICK), "two or more"),
        (
            lambda: harmonise(tiny_dit(), SAMPLING, QUICK, policies=TaylorSeer()),
            "under policies, expected none",
        ),
        (lambda: harmonise_pixart(object(), ["a"]), "expected a PixArt pipeline"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_solvers_that_draw_are_refused() -> None:
    model = DiT(replace(tiny_dit().config, convention=ditkit.load("fashion-dit").config.convention))
    with pytest.raises(ConfigError, match="Ancestral draws noise"):
        ModelProcess(model, SAMPLING.changed(solver=Ancestral()))


def test_another_file_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(CheckpointError, match="expected a cache table"):
        drawn(tiny_dit(), HarmoniCa(table=str(tmp_path / "x.json")))


def test_composes_with_patterns_and_routes_and_refuses_a_second_schedule() -> None:
    model, cache = tiny_dit(), HarmoniCa(rows=("1", "0"))
    pattern = Neighbourhood(radius=2, block=8, kernel="cpu")
    assert not torch.equal(drawn(model, cache, pattern), drawn(model, cache))
    routed = tiny_dit().adopt([DyDiT(width_bias=0.0, token_bias=0.0)]).eval()
    assert not torch.equal(drawn(routed, cache), drawn(model, cache))
    with pytest.raises(ConflictError, match="HarmoniCa and TaylorSeer both own 'schedule'"):
        drawn(model, cache, TaylorSeer())


def test_its_session_is_one_of_a_trajectory() -> None:
    """Training and taps ask every session where its rows are."""
    model = tiny_dit()
    trajectory = Trajectory(model.sites(), [HarmoniCa(rows=("1", "0"))], STEPS)
    assert trajectory.rows(call_at(model, 0, total=STEPS)) == {}


def test_control_follows_the_exact_run() -> None:
    found = training(follow="teacher", proxy="none", beta=0.0, rate=1e-9)
    ends: list[Tensor] = []
    step = found.process.step

    def noted(*args: Any) -> Any:
        state = step(*args)
        ends.append(found.process.latents(state))
        return state

    found.process.step = noted  # type: ignore[method-assign]
    list(found.trajectory(found.process.start(0)))
    followed = ends[-1]
    assert torch.allclose(followed, played(training(), [None] * STEPS)[0][-1], atol=1e-6)


def test_unguided_models_are_trained_alone() -> None:
    model = tiny_dit().requires_grad_(False)
    process = ModelProcess(model, SAMPLING.changed(guidance=Unguided()))
    state = process.start(0)
    assert len(state.x) == 2 and process.predict(state, 0, lambda call: Run()).shape == (2, 3, 8, 8)


def test_pixart_is_trained_and_accelerated(tmp_path: Path) -> None:
    """Three branches a block; the table of its scheduler and steps, and of no others."""
    torch.manual_seed(0)
    pipe, options = pixart(DDIMScheduler)
    pipe.set_progress_bar_config(disable=True)
    captions = {
        name: options[name].float() if name.endswith("embeds") else options[name]
        for name in (
            "prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask",
        )
    }  # fmt: skip
    kind = type(pipe.transformer)
    table = harmonise_pixart(pipe, captions, steps=3, settings=replace(QUICK, trajectories=1, batch=1))
    assert type(pipe.transformer) is kind and len(table.rows) == 3 and len(table.rows[0]) == 6
    path = replace(table, rows=("111111", "101010", "000000")).save(tmp_path / "table.json")
    fast = ditkit.accelerate(pipe, HarmoniCa(table=str(path)))
    given = {**options, "generator": torch.Generator().manual_seed(0)}
    fast(**given, num_inference_steps=3)
    assert fast.report().cost.receipts[0].saved > 0
    with pytest.raises(ConfigError, match="is of 3 evaluations, got 4"):
        fast(**given, num_inference_steps=4)


def test_a_model_that_is_drawn_by_prompts_is_trained_on_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are taken in turn, both branches as one batch; without any it is refused before the first step."""
    torch.manual_seed(0)
    model = TextDiT(TextDiTConfig.tiny()).eval()
    nn.init.normal_(model.head.out.weight)
    process = ModelProcess(model, SAMPLING, prompts=["a red apple", "cat", "a very sad dog"])
    first, second = process.start(0), process.start(1)
    assert first.cond.text is not None and second.cond.text is not None and len(first.x) == 4
    assert not torch.equal(first.cond.text[0], second.cond.text[0])
    assert torch.equal(first.cond.text[0], process.start(3).cond.text[0])
    table = harmonise(model, SAMPLING, replace(QUICK, trajectories=1), prompts=["a red apple", "cat"])
    path = replace(table, rows=("1" * 6, *["101010"] * 3)).save(tmp_path / "table.json")
    drawn = ditkit.generate(
        model, prompt="cat", seeds=(0,), steps=STEPS, guidance=1.5, policies=[HarmoniCa(table=str(path))]
    )
    assert drawn.receipts[0].saved > 0
    folder = model.save(tmp_path / "model")
    words = ["harmonise", str(folder), "--steps", "3", "--trajectories", "1", "--samples", "1", "--out"]
    out = tmp_path / "cache.json"
    assert main([*words, str(out)]) == 2 and not out.exists()
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "a TextDiT is drawn by prompts, got none" in line and "--prompt" in line
    assert main([*words, str(out), "--prompt", "cat"]) == 0 and out.exists()
    with pytest.raises(ConfigError, match="takes no prompt"):
        harmonise(tiny_dit(), SAMPLING, QUICK, prompts=["cat"])


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        (DDPMScheduler, {}),
        (EulerAncestralDiscreteScheduler, {}),
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_schedulers_that_draw_are_refused(scheduler: type[Any], options: Mapping[str, Any]) -> None:
    pipe, given = pixart(scheduler)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **options)
    called: list[int] = []
    pipe.transformer.register_forward_hook(lambda *_: called.append(1))
    with pytest.raises(ConfigError, match=f"{scheduler.__name__} draws noise in its steps"):
        harmonise_pixart(pipe, given, steps=3, settings=QUICK)
    assert not called


def test_schedulers_that_do_not_draw_are_taken() -> None:
    pipe, given = pixart(DPMSolverMultistepScheduler)
    process = PixArtProcess(pipe, given, 3, 2.0, 1, 0)
    assert len(process.times) == 3


def test_from_the_shell(saved: tuple[DiT, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = saved[1].parent / "model", tmp_path / "new" / "cache.json"
    words = ["harmonise", str(model), "--steps", "3", "--trajectories", "1", "--samples", "1"]
    assert main([*words, "--out", str(out), "--beta", "1", "--rate", "9"]) == 0
    said = capsys.readouterr().out
    assert "reused:" in said and f"harmonica:table={out}" in said
    table = CacheTable.load(out)
    assert len(table.rows) == 3 and table.sites == branch_digest(saved[0].sites())
    given = ["--seeds", "0", "--guidance", "1.5", "--out", str(tmp_path / "x.png")]
    use = ["generate", str(model), "--policy", f"harmonica:table={out}", *given]
    assert main([*use, "--steps", "3"]) == 0
    assert main([*use, "--steps", "5"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "is of 3 evaluations, got 5; train again" in line
    assert main([*words, "--out", str(tmp_path / "cache.txt")]) == 2
