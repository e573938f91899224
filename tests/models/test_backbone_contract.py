"""What every model owes; a new file in `models/` is tested by being there."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ditkit.core.catalog import every
from ditkit.core.checkpoint import read_state
from ditkit.core.cond import Cond
from ditkit.core.errors import DitkitError
from ditkit.core.model import Denoiser, Model
from ditkit.core.run import DIRECT, Run, named
from models_support import perturbed

BATCH, CLIP, TOKENS = 3, 5, 4

ON_GRIDS = [kind for kind in every(Model) if kind.__name__ != "Todyformer"]
"""A window of events is no batch of samples: tests/graph/test_todyformer.py asks the same of it."""

pytestmark = pytest.mark.parametrize("kind", ON_GRIDS, ids=lambda kind: kind.__name__)


def awake(kind: type[Model]) -> Model:
    return perturbed(kind(kind.Config.tiny()), 0.1)


def inputs(model: Model, size: int = BATCH) -> tuple[Any, ...]:
    """Arguments of a forward pass, a row a sample. Every sample of a denoiser is told its class, its prompt if the
    model takes one, the streams that it declares, and, of a clip, its first half; in training the second one counts as
    untold, so that no test depends on a draw."""
    x = torch.randn(size, *model.sample_shape)
    if not isinstance(model, Denoiser):
        return (x,)
    cond = Cond(label=torch.arange(size), drop=torch.arange(size) == 1)
    if (text := model.conditions.get("text")) is not None:
        cond = replace(cond, text=torch.randn(size, TOKENS, text.shape[1]))
    streams = {name: c for name, c in model.conditions.items() if name not in Cond.__dataclass_fields__}
    if streams:
        told = {name: torch.rand(size, *c.shape) for name, c in streams.items()}
        absent = {name: torch.arange(size) == 1 for name, c in streams.items() if c.dropout}
        cond = replace(cond, streams=told, absent=absent)
    if x.ndim == CLIP:
        mask = torch.ones(size, 1, *x.shape[2:])
        mask[:, :, : x.shape[2] // 2] = 0
        cond = replace(cond, context=torch.randn_like(x), mask=mask)
    return x, torch.rand(size), cond


def is_hosted(kind: type[Model]) -> bool:
    """Whether blocks take tokens of two streams, which are no tensor, as diffusers' do: then the tests of the hosts say
    what its sites owe."""
    return any(site.kind == "block" and site.stream == "joint" for site in awake(kind).sites())


def rows(arguments: tuple[Any, ...], index: Any) -> tuple[Any, ...]:
    """Some samples of a batch."""
    return tuple(a.rows(index) if isinstance(a, Cond) else a[index] for a in arguments)


def double(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) else a for a in arguments)


def has(kind: type[Model], *kinds: str) -> bool:
    """Whether the model has sites of all these kinds; a recurrent rival has neither blocks nor branches."""
    return set(kinds) <= {site.kind for site in awake(kind).sites()}


class Recording(Run):
    """Notes the name of each site as it is entered, and what the heads return."""

    __slots__ = ("heads", "predictions", "seen")

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.heads, self.predictions = named(model.sites(), "head"), []

    def site(self, name: str, fn: Callable[..., Any], *args: Any) -> Any:
        self.seen.append(name)
        out = super().site(name, fn, *args)
        if name in self.heads:
            self.predictions.append(out)
        return out


def loss(model: Model, given: tuple[Any, ...]) -> tuple[Tensor, list[str]]:
    """Return a number that all predictions count in, those of lower resolutions too, and the sites visited."""
    run = Recording(model)
    out = model(*given, run=run)
    return sum((one.square().sum() for one in run.predictions), out.square().sum()), run.seen


def test_every_site_is_visited_once_in_the_stated_order(kind):
    if is_hosted(kind):
        return  # its sites are named where a handler is
    model = awake(kind)
    run = Recording(model)
    out = model(*inputs(model), run=run)
    names = [site.name for site in model.sites()]
    assert run.seen == names
    assert len(set(names)) == len(names)
    assert out.shape[0] == BATCH


def test_a_handler_of_any_site_that_only_calls_changes_nothing(kind):
    model = awake(kind)
    given = inputs(model)
    exact = model(*given)
    called = []

    def through(name: str) -> Callable[..., Any]:
        return lambda fn, *args: (called.append(name), fn(*args))[1]

    run = Run({site.name: through(site.name) for site in model.sites()})
    assert torch.equal(model(*given, run=run), exact)
    assert called == [site.name for site in model.sites()]


def test_blocks_and_branches_take_tokens_first_and_keep_their_shape(kind):
    if is_hosted(kind):
        return  # two streams
    model = awake(kind)
    given = inputs(model)
    lengths = Counter()
    for segment in model.layout(model.sample_shape):
        lengths[segment.stage] += segment.length
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}

    def note(name: str) -> Callable[..., Any]:
        def handler(fn: Callable[..., Any], *args: Any) -> Any:
            out = fn(*args)
            shapes[name] = (args[0].shape, out.shape)
            return out

        return handler

    stages = {site.name: site.stage for site in model.sites() if site.kind in ("stack", "block", "branch")}
    model(*given, run=Run({name: note(name) for name in stages}))
    assert set(shapes) == set(stages) and bool(stages) == has(kind, "block")
    for name, (before, after) in shapes.items():
        assert before == after and before[:2] == (BATCH, lengths[stages[name]])


def test_a_branch_can_run_on_some_rows_only(kind):
    """Row-wise branches give the same rows; so nothing that is aligned with tokens hides in a closure. One that reads
    its rows as a grid says so, and takes them all."""
    if is_hosted(kind):
        return  # two streams
    model = awake(kind).double()
    compared = []

    def handler(fn: Callable[..., Any], tokens: Tensor, *args: Any) -> Any:
        out, even = fn(tokens, *args), torch.arange(0, tokens.shape[1], 2)
        aligned = (a.rows("image", even) if hasattr(a, "rows") else a for a in args)
        some = fn(tokens[:, even], *aligned)
        assert some.shape == out[:, even].shape
        compared.append(torch.allclose(some, out[:, even], atol=1e-12))
        return out

    branches = [site.name for site in model.sites() if site.kind == "branch" and not site.ordered]
    model(*double(inputs(model)), run=Run(dict.fromkeys(branches, handler)))
    assert len(compared) == len(branches) and any(compared) == has(kind, "branch")


def test_gradient_reaches_every_parameter(kind):
    model = awake(kind).train()
    loss(model, inputs(model))[0].backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []


def test_a_sample_does_not_depend_on_its_neighbours(kind):
    model = awake(kind)
    given, others = inputs(model), inputs(model)
    out = model(*given)
    mixed = tuple(
        Cond.cat([a.rows(slice(1)), b.rows(slice(1, None))])
        if isinstance(a, Cond)
        else torch.cat([a[:1], b[1:]])
        for a, b in zip(given, others, strict=True)
    )
    changed = model(*mixed)
    assert torch.equal(changed[0], out[0])
    assert not torch.allclose(changed[1], out[1])

    model, given = model.double(), double(given)
    alone = [model(*rows(given, slice(i, i + 1))) for i in range(BATCH)]
    assert torch.allclose(torch.cat(alone), model(*given), atol=1e-12)


def test_time_and_condition_change_the_output(kind):
    model = awake(kind)
    if not isinstance(model, Denoiser):
        return  # a forecaster has no time and is told nothing
    x, t, cond = inputs(model)
    out = model(x, t, cond)
    assert not torch.allclose(model(x, t + 0.5, cond), out)
    assert not torch.allclose(model(x, t, model.unconditional(cond)), out)


def test_saving_and_loading_is_exact(kind, tmp_path):
    model = awake(kind)
    given = inputs(model)
    model.save(tmp_path / "a", history=["pruned"])
    loaded = kind.load(tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors"]
    assert (loaded.config, loaded.training, loaded.history) == (model.config, False, ("pruned",))
    assert torch.equal(loaded(*given), model(*given))
    assert Model.load(tmp_path / "a").config == model.config

    loaded.save(tmp_path / "b", history=["quantised"])
    first, second = (read_state(tmp_path / name / "model.safetensors") for name in "ab")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["history"] == ["pruned", "quantised"]


def test_a_loaded_model_can_be_trained(kind, tmp_path):
    model = kind.load(awake(kind).save(tmp_path)).train()
    assert not any(v.is_meta for v in (*model.parameters(), *model.buffers()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    loss(model, inputs(model))[0].backward()
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(trained, before, strict=True))


def test_loading_draws_no_random_numbers(kind, tmp_path):
    awake(kind).save(tmp_path)
    before = torch.get_rng_state()
    kind.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_round_each_weight_and_no_more(kind, tmp_path, dtype):
    model = awake(kind)
    model.save(tmp_path, dtype=dtype)
    stored = load_file(tmp_path / "model.safetensors")
    assert all(v.dtype == dtype for v in stored.values() if v.is_floating_point())
    loaded = kind.load(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.to(dtype).to(value.dtype))
    given = inputs(model)
    out = model(*given)
    relative = (loaded(*given) - out).norm() / out.norm()
    assert 0 < relative < 30 * torch.finfo(dtype).eps


def test_the_hub_names_save_and_load_a_folder(kind, tmp_path):
    model = awake(kind)
    given = inputs(model)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(kind.from_pretrained(tmp_path)(*given), model(*given))
    assert callable(model.push_to_hub)


def test_checkpointing_gives_equal_gradients_and_computes_blocks_again(kind):
    if is_hosted(kind):
        return  # tests/models/test_small_flux.py has its own
    model = awake(kind).train()
    given = inputs(model)
    gradients, visits = [], []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        value, seen = loss(model, given)
        value.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        visits.append(sum(seen.count(site.name) for site in model.sites() if site.kind == "branch"))
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)
    assert visits[1] == 2 * visits[0] and bool(visits[0]) == has(kind, "branch")


def test_checkpointing_is_off_outside_training(kind):
    if is_hosted(kind):
        return  # tests/models/test_small_flux.py has its own
    model = awake(kind)
    model.gradient_checkpointing = True
    value, seen = loss(model, inputs(model))
    value.backward()
    assert seen == [site.name for site in model.sites()]


@pytest.mark.parametrize("training", [False, True])
def test_the_compiled_forward_has_no_break_and_equals_the_eager_one(kind, training):
    if is_hosted(kind):
        return  # a view compiles block by block
    torch.compiler.reset()
    model = awake(kind).train(training)
    given = inputs(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*given, run=DIRECT), model(*given))


def test_nothing_is_kept_between_calls(kind):
    """A call under fake tensors, as an exporter makes it, or in inference mode leaves nothing behind."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = awake(kind).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(*inputs(model))
    given = inputs(model)
    with torch.inference_mode():
        inferred = model(*given)
    out = model(*given)
    out.sum().backward()
    assert torch.equal(out, inferred)


def test_half_precision_runs_throughout(kind):
    model = awake(kind).bfloat16()
    x, *told = inputs(model)
    out = model(x.bfloat16(), *told)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_a_model_is_no_more_than_what_is_saved(kind):
    model = awake(kind)
    held = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    assert sorted(held) == sorted(model.state_dict()), "loading starts on meta: the rest would be lost"


@pytest.mark.parametrize(
    "change", [{"width": 0}, {"width": 30}, {"size": 9}, {"depth": 0}, {"patch": 3}, {"frames": 0}]
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(kind, change):
    ((name, value),) = change.items()
    names = {f.name for f in fields(kind.Config)}
    if name not in names or (
        change == {"width": 30} and "heads" not in names
    ):  # into which it would not divide
        return
    with pytest.raises(DitkitError) as caught:
        kind(replace(kind.Config.tiny(), **change))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value) and str(value) in str(caught.value)
