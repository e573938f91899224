"""What every model owes; a new file in `models/` is tested by being there."""

from __future__ import annotations

import json
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
from ditkit.core.model import Model
from ditkit.core.run import DIRECT, Run

SHRUNK = {"size": 8, "patch": 2, "channels": 3, "width": 32, "depth": 2, "heads": 4, "classes": 5}
BATCH = 3

pytestmark = pytest.mark.parametrize("kind", every(Model), ids=lambda kind: kind.__name__)


def config_of(kind: type[Model]) -> Any:
    """The default config with the sizes that every backbone has made small."""
    default = kind.Config()
    return replace(default, **{f.name: SHRUNK[f.name] for f in fields(default) if f.name in SHRUNK})


def awake(kind: type[Model]) -> Model:
    """In eval mode, with no parameter left at zero: a zero gate would hide what lies behind it."""
    model = kind(config_of(kind)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(model: Model, size: int = BATCH) -> tuple[Tensor, Tensor, Cond]:
    """Every sample told; in training the second one counts as untold, so that no test depends on a draw."""
    drop = torch.arange(size) == 1
    return torch.randn(size, *model.sample_shape), torch.rand(size), Cond(label=torch.arange(size), drop=drop)


class Recording(Run):
    """Notes the name of each site as it is entered."""

    __slots__ = ("seen",)

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def site(self, name: str, fn: Callable[..., Any], *args: Any) -> Any:
        self.seen.append(name)
        return super().site(name, fn, *args)


def test_every_site_is_visited_once_in_the_stated_order(kind):
    model = awake(kind)
    run = Recording()
    out = model(*inputs(model), run=run)
    names = [site.name for site in model.sites()]
    assert run.seen == names
    assert len(set(names)) == len(names)
    assert out.shape[0] == BATCH


def test_a_handler_of_any_site_that_only_calls_changes_nothing(kind):
    model = awake(kind)
    x, t, cond = inputs(model)
    exact = model(x, t, cond)
    called = []

    def through(name: str) -> Callable[..., Any]:
        return lambda fn, *args: (called.append(name), fn(*args))[1]

    run = Run({site.name: through(site.name) for site in model.sites()})
    assert torch.equal(model(x, t, cond, run=run), exact)
    assert called == [site.name for site in model.sites()]


def test_blocks_and_branches_take_tokens_first_and_keep_their_shape(kind):
    model = awake(kind)
    x, t, cond = inputs(model)
    length = sum(segment.length for segment in model.layout(model.sample_shape))
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}

    def note(name: str) -> Callable[..., Any]:
        def handler(fn: Callable[..., Any], *args: Any) -> Any:
            out = fn(*args)
            shapes[name] = (args[0].shape, out.shape)
            return out

        return handler

    names = [site.name for site in model.sites() if site.kind in ("stack", "block", "branch")]
    model(x, t, cond, run=Run({name: note(name) for name in names}))
    assert list(shapes) and set(shapes) == set(names)
    for before, after in shapes.values():
        assert before == after and before[:2] == (BATCH, length)


def test_a_branch_can_run_on_some_rows_only(kind):
    """Row-wise branches give the same rows; so nothing that is aligned with tokens hides in a closure."""
    model = awake(kind).double()
    x, t, cond = (v.double() if isinstance(v, Tensor) else v for v in inputs(model))
    compared = []

    def handler(fn: Callable[..., Any], tokens: Tensor, *args: Any) -> Any:
        out = fn(tokens, *args)
        some = fn(tokens[:, ::2], *args)
        assert some.shape == out[:, ::2].shape
        compared.append(torch.allclose(some, out[:, ::2], atol=1e-12))
        return out

    branches = [site.name for site in model.sites() if site.kind == "branch"]
    model(x, t, cond, run=Run(dict.fromkeys(branches, handler)))
    assert len(compared) == len(branches) and any(compared)


def test_gradient_reaches_every_parameter(kind):
    model = awake(kind).train()
    model(*inputs(model)).square().sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []


def test_a_sample_does_not_depend_on_its_neighbours(kind):
    model = awake(kind)
    x, t, cond = inputs(model)
    out = model(x, t, cond)
    others = cond.map(lambda v: torch.cat([v[:1], v[1:].flip(0)]))
    changed = model(torch.cat([x[:1], torch.randn_like(x[1:])]), torch.cat([t[:1], t[1:] / 2]), others)
    assert torch.equal(changed[0], out[0])
    assert not torch.allclose(changed[1], out[1])

    model = model.double()
    alone = [model(x[i : i + 1].double(), t[i : i + 1], cond.rows(slice(i, i + 1))) for i in range(BATCH)]
    assert torch.allclose(torch.cat(alone), model(x.double(), t, cond), atol=1e-12)


def test_time_and_condition_change_the_output(kind):
    model = awake(kind)
    x, t, cond = inputs(model)
    out = model(x, t, cond)
    assert not torch.allclose(model(x, t + 0.5, cond), out)
    assert not torch.allclose(model(x, t, model.unconditional(cond)), out)


def test_saving_and_loading_is_exact(kind, tmp_path):
    model = awake(kind)
    x, t, cond = inputs(model)
    model.save(tmp_path / "a", history=["pruned"])
    loaded = kind.load(tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors"]
    assert (loaded.config, loaded.training, loaded.history) == (model.config, False, ("pruned",))
    assert torch.equal(loaded(x, t, cond), model(x, t, cond))
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
    model(*inputs(model)).square().sum().backward()
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
    x, t, cond = inputs(model)
    out = model(x, t, cond)
    relative = (loaded(x, t, cond) - out).norm() / out.norm()
    assert 0 < relative < 30 * torch.finfo(dtype).eps


def test_the_hub_names_save_and_load_a_folder(kind, tmp_path):
    model = awake(kind)
    x, t, cond = inputs(model)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(kind.from_pretrained(tmp_path)(x, t, cond), model(x, t, cond))
    assert callable(model.push_to_hub)


def test_checkpointing_gives_equal_gradients_and_computes_blocks_again(kind):
    model = awake(kind).train()
    x, t, cond = inputs(model)
    gradients, visits = [], []
    for model.gradient_checkpointing in (False, True):
        run = Recording()
        model.zero_grad()
        model(x, t, cond, run=run).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        visits.append(sum(run.seen.count(site.name) for site in model.sites() if site.kind == "branch"))
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)
    assert visits[1] == 2 * visits[0]


def test_checkpointing_is_off_outside_training(kind):
    model = awake(kind)
    model.gradient_checkpointing = True
    run = Recording()
    model(*inputs(model), run=run).square().sum().backward()
    assert run.seen == [site.name for site in model.sites()]


@pytest.mark.parametrize("training", [False, True])
def test_the_compiled_forward_has_no_break_and_equals_the_eager_one(kind, training):
    torch.compiler.reset()
    model = awake(kind).train(training)
    x, t, cond = inputs(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, t, cond, run=DIRECT), model(x, t, cond))


def test_nothing_is_kept_between_calls(kind):
    """A call under fake tensors, as an exporter makes it, or in inference mode leaves nothing behind."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = kind(config_of(kind)).eval()
        fake(*inputs(fake))
    model = awake(kind).train()
    x, t, cond = inputs(model)
    with torch.inference_mode():
        inferred = model(x, t, cond)
    out = model(x, t, cond)
    out.sum().backward()
    assert torch.equal(out, inferred)


def test_half_precision_runs_throughout(kind):
    model = awake(kind).bfloat16()
    x, t, cond = inputs(model)
    out = model(x.bfloat16(), t, cond)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_a_model_is_no_more_than_what_is_saved(kind):
    model = awake(kind)
    held = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    assert sorted(held) == sorted(model.state_dict()), "loading starts on meta: the rest would be lost"


@pytest.mark.parametrize("change", [{"width": 30}, {"size": 9}, {"depth": 0}])
def test_sizes_that_do_not_fit_are_refused_in_one_line(kind, change):
    with pytest.raises(DitkitError) as caught:
        kind(replace(config_of(kind), **change))
    assert "\n" not in str(caught.value)
    assert f"{next(iter(change))}={next(iter(change.values()))}" in str(caught.value)
