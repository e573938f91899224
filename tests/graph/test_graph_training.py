"""Training on events: in the order of time, on nothing that comes later, resumed to the bit, and it learns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from graphs_support import contacts, small

from ditkit.core.errors import ConfigError, DataError, DitkitError
from ditkit.core.model import Model
from ditkit.data.events import EventSet
from ditkit.data.loading import load_events
from ditkit.models.predformer import PredFormer, PredFormerConfig
from ditkit.models.todyformer import Todyformer
from ditkit.recipes.todyformer import todyformer, todyformer_classes
from ditkit.tasks.graph.recipe import LinkTargets, NodeTargets, hidden_nodes
from ditkit.tasks.graph.scores import node_scores, score_links
from ditkit.tasks.graph.task import predicted_links
from ditkit.tasks.recipe import describe, train_recipe
from ditkit.train.ema import Constant
from ditkit.train.graph_targets import GraphTargets
from ditkit.train.loop import train
from ditkit.train.optimizers import optimizers_of
from ditkit.train.randomness import SampleRNG, ordered_indices
from ditkit.train.settings import Settings
from ditkit.train.terms.cross_entropy import CrossEntropy

RNG = SampleRNG(0, 0, range(20))


def test_batches_follow_one_another_and_none_reaches_over_the_end():
    steps = [ordered_indices(23, 5, step).tolist() for step in range(8)]
    assert steps[0] == [0, 1, 2, 3, 4] and steps[3] == [15, 16, 17, 18, 19]
    assert steps[4] == [3, 4, 5, 6, 7] and steps[7][-1] == 22
    assert {i for batch in steps for i in batch} == set(range(23)), "two epochs meet every sample"
    with pytest.raises(ConfigError, match="batch=24 of 23 samples"):
        ordered_indices(23, 24, 0)


def test_a_batch_of_links_reads_what_is_strictly_before_its_first_target():
    events = contacts(people=12, events=200)
    samples = LinkTargets(events, window=30, patches=4)
    assert events.before(samples.first) >= 4 > events.before(samples.first - 1)
    batch, _ = samples.batch(torch.arange(50, 70), RNG)
    first = samples.first + 50
    stop = events.before(first)
    assert len(batch.patches.age) == 30 and batch.patches.age[-1] == 0
    seen = events.time[stop - 1] - batch.patches.age.double()
    assert (seen < events.time[first]).all()
    links, negatives = batch.ids[:20], batch.ids[20:]
    assert torch.equal(links, events.pairs[first : first + 20]) and torch.equal(links[:, 0], negatives[:, 0])
    assert batch.labels.tolist() == [1] * 20 + [0] * 20


def test_hidden_nodes_take_no_part_in_training_and_some_in_the_test():
    events = contacts(people=30, events=400)
    parts = events.split()
    hidden = hidden_nodes(events, parts, 0.1, seed=0)
    assert len(hidden) == 3
    training = events.part(parts.training)
    training = training.part(~training.touching(hidden))
    assert not training.touching(hidden).any() and len(training) < len(parts.training)
    assert events.touching(hidden)[parts.test.start :].any()
    assert torch.equal(hidden, hidden_nodes(events, parts, 0.1, seed=0))


def test_a_graph_too_small_for_its_patches_is_refused_in_one_line():
    with pytest.raises(
        DataError, match=r"contacts: 5 events, none with 8 earlier ones, which patches=8 need"
    ):
        LinkTargets(contacts(events=5), window=40, patches=8)


def test_cross_entropy_is_zero_at_certainty_and_leaves_unknown_classes_out():
    from ditkit.train.objective import Batch

    logits, labels = torch.tensor([50.0, -50.0]), torch.tensor([1, 0])
    assert CrossEntropy().loss(Batch(data=labels, prediction=logits, taps={})).max() < 1e-6
    scores, classes = torch.randn(5, 3), torch.tensor([0, -1, 2, 1, -1])
    loss = CrossEntropy().loss(Batch(data=classes, prediction=scores, taps={})).mean()
    own = scores.log_softmax(-1)[[0, 2, 3], [0, 2, 1]]
    torch.testing.assert_close(loss, -own.mean())


def test_models_on_grids_are_refused():
    with pytest.raises(ConfigError, match="PredFormer has samples on a grid; expected a model of graphs"):
        GraphTargets().check(PredFormer(PredFormerConfig.tiny()))


SETTINGS = Settings(steps=6, batch=20, learning_rate=1e-2, save_every=3, sheet_every=0)


def curve(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "losses.jsonl").read_text().splitlines()]


def test_a_resumed_run_has_the_losses_of_one_that_was_not_stopped(tmp_path):
    samples = LinkTargets(contacts(people=12, events=200), window=40, patches=4)

    def run(folder: Path, steps: int, resume: bool = False) -> Model:
        torch.manual_seed(0)
        model = Todyformer(small(dropout=0.3))
        return train(model, samples, GraphTargets(), replace(SETTINGS, steps=steps), folder, resume=resume)

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 3)
    resumed = run(tmp_path / "parts", 6, resume=True)
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_muon_takes_the_matrices_of_the_blocks():
    rules = optimizers_of(Todyformer(small()), replace(SETTINGS, optimizer="muon"))
    matrices = sum(len(group["params"]) for group in rules[0].param_groups)
    assert len(rules) == 2 and matrices == 2 * (3 + 4 + 1)


def fashions(people: int = 16, events: int = 900) -> EventSet:
    """Half of the nodes turn to the other half, of whom only two are in fashion at a time."""
    draw = torch.Generator().manual_seed(0)
    source = torch.randint(people // 2, (events,), generator=draw)
    hot = 2 * (torch.arange(events) // 50) + torch.randint(2, (events,), generator=draw)
    return EventSet(
        name="fashions",
        source=source,
        destination=people // 2 + hot % (people // 2),
        time=torch.arange(events).double(),
        nodes=tuple(map(str, range(people))),
        labels=(torch.arange(people) < people // 2).long(),
        classes=("right", "left"),
    )


def test_links_to_those_in_fashion_are_learned(tmp_path):
    events = fashions()
    settings = replace(SETTINGS, steps=60, save_every=0, averages=(Constant(0.5),))
    model = train(
        Todyformer(small(width=16, features=0, window=60, dropout=0.0)),
        LinkTargets(events.part(range(600)), window=60, patches=4),
        GraphTargets(),
        settings,
        tmp_path,
    )
    losses = curve(tmp_path)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    rows = score_links(model, events, range(700, 900), known=600, batch=20, rivals=4)
    by = {(row["predictor"], row["negatives"]): row["ap"] for row in rows}
    assert set(by) == {
        (p, n) for p in ("Todyformer", "EdgeBank") for n in ("random", "historical", "inductive")
    }
    assert min(by["Todyformer", "random"], by["Todyformer", "historical"]) > 0.8
    assert by["EdgeBank", "historical"] < 0.55, "all of these links are old"


def write_events(folder: Path, events: EventSet) -> Path:
    """The events as a user's own file, with classes of both ends."""
    lines = ["source,destination,time,side_s,side_d"]
    lines += [
        f"{u},{v},{t},{events.classes[events.labels[u]]},{events.classes[events.labels[v]]}"
        for (u, v), t in zip(events.pairs.tolist(), events.time.tolist(), strict=True)
    ]
    path = folder / "met.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("build", [todyformer, todyformer_classes], ids=lambda b: b.__name__)
def test_a_recipe_runs_from_a_file_to_a_picture_and_scores(build, tmp_path):
    path = write_events(tmp_path, fashions())
    recipe = build()
    options = {"source_label": "side_s", "destination_label": "side_d"}
    recipe = replace(
        recipe,
        data=str(path),
        options=options,
        model=replace(recipe.model, width=8, heads=2, layout="LG", window=60, patches=4),
        settings=replace(SETTINGS, steps=2, batch=20, save_every=0, sheet_every=2),
    )
    text = describe(recipe)
    assert "900 events of 16 nodes" in text and "MACs of a step" in text and "MACs of a sample" not in text
    trained = train_recipe(recipe, tmp_path / "run")
    loaded = Model.load(tmp_path / "run" / "model")
    assert loaded.config == trained.config and loaded.config.features == 0
    (picture,) = (tmp_path / "run" / "samples").glob("*.png")
    assert picture.stat().st_size > 5_000
    events = load_events(path, **options)
    if build is todyformer:
        links = predicted_links(loaded, events, "3", count=4)
        assert len(links) == 4 and [p for _, p in links] == sorted((p for _, p in links), reverse=True)
        assert all(0 <= p <= 1 and name in events.nodes for name, p in links)
    else:
        assert loaded.config.classes == 2
        score = node_scores(loaded, events, range(800, 900), batch=20)
        assert score["nodes"] == 12 and 0 <= score["accuracy"] <= 1


def test_classes_of_held_out_nodes_are_not_trained_on():
    events = fashions()
    held = torch.tensor([0, 9])
    batch, _ = NodeTargets(events, window=60, patches=4, held_out=held).batch(torch.arange(100, 120), RNG)
    assert len(batch.ids) == 40
    hidden = torch.isin(batch.ids, held)
    assert (batch.labels[hidden] == -1).all() and hidden.any()
    assert torch.equal(batch.labels[~hidden], events.labels[batch.ids[~hidden]])


def test_wrong_requests_are_one_line():
    model, events = Todyformer(small()).eval(), contacts()
    with pytest.raises(ConfigError, match="unknown node of contacts 'p99'"):
        predicted_links(model, events, "p99")
    with pytest.raises(DitkitError, match="3 features an event, expected 2"):
        predicted_links(model, contacts(features=3), "p1")
    with pytest.raises(ConfigError, match=r"hidden=1\.0 should be a share"):
        replace(todyformer(), hidden=1.0)
    with pytest.raises(ConfigError, match="predicts links, expected a model of classes"):
        node_scores(model, events, range(40, 60))
