"""Todyformer against loops, and what its specification promises: isolation, no look-ahead, equivariance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from graphs_support import awake, contacts, small, twin_embeddings
from torch import Tensor

from ditkit.attention.neighbourhood import Neighbourhood
from ditkit.caching.taylorseer import TaylorSeer
from ditkit.core.errors import DitkitError, ShapeError
from ditkit.core.model import Model, parameter_count
from ditkit.core.run import DIRECT, Run
from ditkit.core.trajectory import Trajectory
from ditkit.models.todyformer import Todyformer, TodyformerConfig
from ditkit.nn.patches import Patches, patchify

NODES = torch.arange(8)


def patches_of(window: Any, count: int = 4) -> Patches:
    """A window's patches in float64, as the model under test."""
    return patchify(*window, count).to(dtype=torch.float64)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layout": "L*2"},
        {"layout": "G*2"},
        {"layout": "LLGG", "positions": "index"},
        {"positions": "none", "readout": "mean"},
        {"patches": 1},
        {"patches": 6, "positions": "index"},
        {"node_features": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [9, 40])
def test_embeddings_are_those_of_the_loops(changes, size):
    model = awake(small(**changes))
    own = torch.randn(8, model.config.node_features)
    window = contacts(node_features=own).window(60, size)
    z = model.embed(patches_of(window, model.config.patches), NODES)
    for node, expected in twin_embeddings(model, window, model.config.patches).items():
        torch.testing.assert_close(z[node], expected, rtol=1e-9, atol=1e-9)


def test_packing_and_unpacking_is_the_identity():
    made = patches_of(contacts().window(60, 40))
    x = torch.randn(len(made.node), 5)
    assert torch.equal(made.unpack(made.pack(x)), x)
    packed = made.pack(x)
    assert packed.shape == (len(made.nodes), 4, 5) and not packed[~made.present()].any()
    assert int(made.present().sum()) == len(x)


@pytest.mark.parametrize("filling", [float("nan"), 1e9])
def test_what_stands_in_padded_slots_changes_no_bit(filling, monkeypatch):
    model, made = awake(), patches_of(contacts().window(60, 12))
    assert not made.present().all()
    exact = model.embed(made, NODES)
    plain = Patches.pack
    monkeypatch.setattr(
        Patches,
        "pack",
        lambda self, x: plain(self, x).masked_fill(~self.present()[..., None], filling),
    )
    assert torch.equal(model.embed(made, NODES), exact)


def test_with_one_patch_and_no_value_path_the_model_is_plain_dyg2vec():
    model, window = awake(small(patches=1, positions="none")), contacts().window(60, 40)
    alone = Todyformer(small(patches=1, layout="L*2")).double().eval()
    state = model.state_dict()
    local = {
        name.replace("blocks.2.", "blocks.1."): v
        for name, v in state.items()
        if "blocks.1." not in name and "blocks.3." not in name
    }
    alone.load_state_dict(local)
    made = patches_of(window, 1)
    assert not torch.allclose(model.embed(made, NODES), alone.embed(made, NODES))
    with torch.no_grad():
        for block in model.blocks[1::2]:
            block.attn.out.weight.zero_(), block.attn.out.bias.zero_()
            block.mlp.outer.weight.zero_(), block.mlp.outer.bias.zero_()
    torch.testing.assert_close(model.embed(made, NODES), alone.embed(made, NODES), rtol=1e-12, atol=1e-12)


def test_with_one_patch_global_attention_is_its_value_path():
    model, made = awake(small(patches=1)), patches_of(contacts().window(60, 40), 1)
    block = model.blocks[1]
    x = torch.randn(len(made.node), 8, dtype=torch.float64)
    v = block.attn.qkv(block.norm_attn(x))[:, 16:]
    branch = block.attend(DIRECT, "blocks.1.attn", x, made)
    torch.testing.assert_close(branch, block.attn.out(v), rtol=1e-12, atol=1e-12)


def outputs_of(model: Todyformer, made: Patches) -> list[Tensor]:
    """The tokens after each block."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., Any]:
        return lambda fn, *args: kept.setdefault(name, fn(*args))

    names = [site.name for site in model.sites() if site.kind == "block"]
    model(made, NODES[None, :2], run=Run({name: keep(name) for name in names}))
    return [kept[name] for name in names]


def test_a_patch_sees_another_only_through_a_global_block():
    model, window = awake(), contacts().window(60, 40)
    other = window.features.clone()
    other[:10] += 1.0  # the events of patch 0
    before, after = (outputs_of(model, patches_of(w)) for w in (window, window._replace(features=other)))
    patch = patches_of(window).patch
    changed = [(a != b).any(-1) for a, b in zip(before, after, strict=True)]
    assert not changed[0][patch != 0].any() and changed[0][patch == 0].any()
    assert changed[1][patch != 0].any()


def test_a_global_block_never_mixes_two_nodes():
    model, made = awake(), patches_of(contacts().window(60, 40))
    x = torch.randn(len(made.node), 8, dtype=torch.float64)
    y = x.clone()
    y[made.node == 3] += 1.0
    block = model.blocks[1]
    same = (block(x, made) == block(y, made)).all(-1)
    assert same[made.node != 3].all() and not same[made.node == 3].any()


@pytest.mark.parametrize("i", [30, 41, 59])
def test_no_event_at_or_after_i_changes_anything_for_target_i(i):
    model, events = awake(), contacts()
    draw = torch.Generator().manual_seed(5)
    source = torch.randint(8, (60,), generator=draw)
    later = torch.arange(60) >= i
    changed = replace(
        events,
        source=torch.where(later, source, events.source),
        destination=torch.where(later, (source + 3) % 8, events.destination),
        features=torch.where(later[:, None], 7.0, events.features),
        time=torch.where(later & (torch.arange(60) > i), events.time + 1e6, events.time),
    )
    shorter = events.part(range(i + 1))
    z = model.embed(patches_of(events.window(i, 24)), NODES)
    assert torch.equal(model.embed(patches_of(changed.window(i, 24)), NODES), z)
    assert torch.equal(model.embed(patches_of(shorter.window(i, 24)), NODES), z)


def test_the_time_of_the_target_itself_changes_nothing_but_its_ties():
    events = contacts()
    i = int(events.before(40))  # the first of its time stamp
    moved = events.time.clone()
    moved[i:] += 12345.0
    one, two = events.window(i, 20), replace(events, time=moved).window(i, 20)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_events_at_the_time_of_the_target_are_not_in_its_window():
    events = contacts()
    tied = next(i for i in range(20, 60) if events.time[i] == events.time[i - 1])
    assert events.before(tied) < tied
    assert torch.equal(
        events.window(tied, 10).source, events.source[events.before(tied) - 10 : events.before(tied)]
    )


def test_relabelled_nodes_permute_the_embeddings():
    model, events = awake(), contacts()
    order = torch.randperm(8)
    renamed = replace(events, source=order[events.source], destination=order[events.destination])
    z, moved = (model.embed(patches_of(e.window(60, 40)), NODES) for e in (events, renamed))
    torch.testing.assert_close(moved[order], z, rtol=1e-10, atol=1e-10)


def test_a_shift_of_all_times_changes_no_bit_even_at_unix_times():
    model, events = awake(), contacts()
    later = replace(events, time=events.time + 1_353_303_380)
    z, moved = (model.embed(patches_of(e.window(60, 40)), NODES) for e in (events, later))
    assert torch.equal(z, moved)


def test_with_index_positions_time_enters_through_its_encoding_alone():
    model, events = awake(small(positions="index")), contacts()
    slower = replace(events, time=events.time * 2)
    with torch.no_grad():
        z = model.embed(patches_of(events.window(60, 40)), NODES)
        scaled = patches_of(slower.window(60, 40))
        assert not torch.allclose(model.embed(scaled, NODES), z)
        model.time.frequency /= 2
        torch.testing.assert_close(model.embed(scaled, NODES), z, rtol=1e-10, atol=1e-10)


def test_nodes_outside_the_window_share_a_learned_embedding_that_is_trained():
    model = awake().train()
    made = patches_of(contacts().window(60, 4), 4)
    outside = torch.tensor([n for n in range(8) if n not in made.nodes.tolist()])
    assert len(outside) >= 2
    z = model.embed(made, outside)
    assert torch.equal(z[0], z[1]) and torch.equal(z[0], model.newcomer)
    z.sum().backward()
    assert model.newcomer.grad is not None and model.newcomer.grad.all()


@pytest.mark.parametrize(
    "changes", [{}, {"positions": "index"}, {"classes": 3}, {"node_features": 2}], ids=str
)
def test_gradient_reaches_every_parameter(changes):
    model = awake(small(**changes)).train()
    events = contacts(node_features=torch.randn(8, model.config.node_features))
    made = patches_of(events.window(60, 40))
    targets = (
        torch.arange(9) if model.config.classes else torch.tensor([[0, 1], [2, 8], [5, 6]])
    )  # 8 is nobody
    model(made, targets).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_sites_are_visited_once_in_the_stated_order_and_handlers_change_nothing():
    model, made = awake(), patches_of(contacts().window(60, 40))
    visited: list[str] = []

    def through(name: str) -> Callable[..., Any]:
        return lambda fn, *args: (visited.append(name), fn(*args))[1]

    names = [site.name for site in model.sites()]
    pairs = torch.tensor([[0, 1], [2, 3]])
    exact = model(made, pairs)
    assert torch.equal(model(made, pairs, run=Run({name: through(name) for name in names})), exact)
    assert visited == names


def test_branches_take_tokens_first_and_keep_their_shape():
    model, made = awake(), patches_of(contacts().window(60, 40))
    shapes = []

    def note(fn: Callable[..., Any], *args: Any) -> Any:
        out = fn(*args)
        shapes.append((args[0].shape, out.shape))
        return out

    names = [site.name for site in model.sites() if site.kind in ("stack", "block", "branch")]
    model(made, NODES[None, :2], run=Run(dict.fromkeys(names, note)))
    assert len(shapes) == len(names) == 1 + 4 + 2 + 2 * 2, "a stack, blocks, and branches of both kinds"
    assert {s for pair in shapes for s in pair} == {torch.Size([len(made.node), 8])}


def test_saving_and_loading_is_exact(tmp_path):
    model, made = awake().float(), patchify(*contacts().window(60, 40), 4)
    loaded = Model.load(model.save(tmp_path))
    pairs = torch.tensor([[0, 1], [2, 3]])
    assert loaded.config == model.config
    assert torch.equal(loaded(made, pairs), model(made, pairs))


def test_checkpointed_blocks_give_equal_gradients():
    model, made = awake().train(), patches_of(contacts().window(60, 40))
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        torch.manual_seed(1)  # of the dropout, which is drawn again the same
        model(made, NODES[None, :2]).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_dropout_is_drawn_in_training_only():
    model, made = awake(small(dropout=0.5)), patches_of(contacts().window(60, 40))
    pairs = NODES[None, :2]
    assert torch.equal(model(made, pairs), model(made, pairs))
    model.train()
    assert not torch.equal(model(made, pairs), model(made, pairs))


def test_the_paper_size_has_its_parameters():
    """d 100, 2 heads, 3 blocks: counted by hand."""
    d = 100
    local = (
        (d * d + d) + 2 * d * d + (2 * d * d + 2 * d)
    )  # q; W_k and W_v of h_j, without bias; of the edge token
    positions = d + d + (d * d + d)
    attention, mlp, norms = 4 * d * d + 4 * d, 8 * d * d + 5 * d, 2 * 2 * d
    structure = (3 * d + d) + (d * d + d)
    link = (2 * d * d + d) + (d + 1)
    shared = d + d + 2 * d + 2 * d  # newcomer, first token, final norm, time encoder
    total = 3 * (local + positions + attention + mlp + norms) + structure + link + shared
    assert parameter_count(Todyformer(TodyformerConfig())) == total


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 9}, "width=9 does not divide into heads=2"),
        ({"layout": "LX"}, r"layout='LX' should be letters L \(local\) and G \(global\)"),
        ({"layout": ""}, "layout=''"),
        ({"layout": "L*2000"}, "2000 blocks"),
        ({"patches": 0}, "patches=0 should be at least 1"),
        ({"window": 3}, "window=3 should hold at least patches=4 events"),
        ({"positions": "sin"}, "unknown positions 'sin'"),
        ({"readout": "max"}, "unknown readout 'max'"),
        ({"dropout": 1.0}, r"dropout=1.0 should lie in \[0, 1\)"),
    ],
)
def test_configs_that_make_no_network_are_refused_in_one_line(changes, words):
    with pytest.raises(DitkitError, match=words):
        Todyformer(small(**changes))


def test_a_window_of_other_features_is_refused():
    made = patchify(*contacts(features=3).window(60, 40), 4)
    with pytest.raises(ShapeError, match="3 features an event, expected 2"):
        awake().float()(made, NODES[None, :2])
    with pytest.raises(ShapeError, match=r"targets \[8\] should be \[P, 2\]"):
        awake()(patches_of(contacts().window(60, 40)), NODES)


def test_a_model_of_graphs_has_an_empty_layout():
    model = awake()
    assert model.layout(model.sample_shape) == () and model.sample_shape == ()


@pytest.mark.parametrize(
    "policy", [TaylorSeer(interval=2), Neighbourhood(radius=1)], ids=lambda p: type(p).__name__
)
def test_policies_of_pictures_are_refused_by_name(policy):
    """A cache forecasts over steps, and a graph has one evaluation; a neighbourhood is one of a grid."""
    with pytest.raises(DitkitError, match=type(policy).__name__):
        trajectory = Trajectory(awake().sites(), [policy], 1)
        trajectory.finish()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same_embeddings_and_the_same_bits_twice():
    model, made = awake(), patches_of(contacts().window(60, 40))
    exact = model.embed(made, NODES)
    one, two = (model.cuda().embed(made.to("cuda"), NODES.cuda()) for _ in range(2))
    assert torch.equal(one, two)
    torch.testing.assert_close(one.cpu(), exact, rtol=1e-10, atol=1e-10)
