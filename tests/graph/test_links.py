"""Scores of links against brute force, negatives of all three kinds, and EdgeBank."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from graphs_support import contacts

from ditkit.core.errors import ConfigError, DataError
from ditkit.data.negatives import KINDS, Negatives
from ditkit.metrics.links import average_precision, mean_reciprocal_rank, roc_auc
from ditkit.tasks.graph.edge_bank import EdgeBank
from ditkit.tasks.graph.scores import link_scores

SCORES = [
    ([0.9, 0.1, 0.5, 0.4], [1, 0, 1, 0]),
    ([0.5, 0.5, 0.5, 0.5], [1, 0, 0, 1]),
    ([3.0, 1.0, 1.0, -2.0, 3.0, 1.0], [1, 1, 0, 0, 0, 1]),
    ([40.0, 50.0, 60.0, 45.0], [0, 1, 1, 0]),  # a sigmoid of these in float32 is 1 four times
    ([-200.0, -150.0, -150.0, -300.0], [1, 1, 0, 0]),
]


def twin_auc(scores, labels):
    """The share of (positive, negative) pairs in the right order; a tie is half of one."""
    positive = [s for s, y in zip(scores, labels, strict=True) if y]
    negative = [s for s, y in zip(scores, labels, strict=True) if not y]
    return sum((p > n) + 0.5 * (p == n) for p in positive for n in negative) / len(positive) / len(negative)


def twin_ap(scores, labels):
    """sum over thresholds of (recall - last recall) precision; equal scores are one threshold."""
    total, points = sum(labels), [(0.0, 1.0)]
    for threshold in sorted(set(scores), reverse=True):
        above = [y for s, y in zip(scores, labels, strict=True) if s >= threshold]
        points.append((sum(above) / total, sum(above) / len(above)))
    return sum((r - before) * p for (before, _), (r, p) in pairwise(points))


@pytest.mark.parametrize(("scores", "labels"), SCORES)
def test_ap_and_auc_are_those_of_brute_force_with_ties(scores, labels):
    given = torch.tensor(scores), torch.tensor(labels)
    assert average_precision(*given) == pytest.approx(twin_ap(scores, labels), abs=1e-6)
    assert roc_auc(*given) == pytest.approx(twin_auc(scores, labels), abs=1e-6)


def test_the_reciprocal_rank_of_a_tie_is_that_of_its_middle():
    positive = torch.tensor([0.5, 0.9, 0.1, 0.5])
    rivals = torch.tensor([[0.5, 0.5, 0.1], [0.1, 0.2, 0.3], [0.2, 0.3, 0.4], [0.6, 0.5, 0.1]])
    ranks = [2.0, 1.0, 4.0, 2.5]  # 1 + how many are above + half of the equal ones
    assert mean_reciprocal_rank(positive, rivals) == pytest.approx(sum(1 / r for r in ranks) / 4)


def test_a_score_that_is_not_finite_is_refused():
    with pytest.raises(DataError, match="1 of 2 scores is not finite"):
        average_precision(torch.tensor([0.1, float("nan")]), torch.tensor([0, 1]))


@pytest.mark.parametrize("directed", [True, False])
def test_a_random_negative_keeps_its_source_and_is_no_event_of_that_moment(directed):
    events = contacts(people=12, events=200, directed=directed)
    targets = torch.arange(100, 160)
    drawn = Negatives(events, "random").draw(targets, torch.Generator().manual_seed(0))
    assert torch.equal(drawn[:, 0], events.source[targets])
    assert torch.isin(drawn[:, 1], events.candidates).all()
    for (u, v), i in zip(drawn.tolist(), targets.tolist(), strict=True):
        same = (events.time == events.time[i]).nonzero().flatten().tolist()
        there = {(int(events.source[e]), int(events.destination[e])) for e in same}
        assert u != v and (u, v) not in there and (directed or (v, u) not in there)


def test_negatives_of_a_bipartite_graph_come_from_its_destinations():
    events = contacts(
        people=20, events=100, source=torch.arange(100) % 4, destination=4 + torch.arange(100) % 7
    )
    assert events.bipartite
    for kind in KINDS:
        drawn = Negatives(events, kind, known=50).draw(torch.arange(60, 99), torch.Generator().manual_seed(0))
        assert drawn[:, 0].max() < 4 and drawn[:, 1].min() >= 4 and drawn[:, 1].max() < 11


def links_of(events, which) -> set[tuple[int, int]]:
    return {(int(events.source[e]), int(events.destination[e])) for e in which}


def test_historical_negatives_happened_before_and_not_now():
    events = contacts(people=12, events=200)
    targets = torch.arange(150, 170)
    drawn = {
        tuple(p)
        for p in Negatives(events, "historical").draw(targets, torch.Generator().manual_seed(0)).tolist()
    }
    start, stop = events.before(150), 200
    now = links_of(
        events, (e for e in range(start, stop) if events.time[start] <= events.time[e] <= events.time[169])
    )
    assert len(drawn) == 20
    assert drawn <= links_of(events, range(start)) - now


def test_inductive_negatives_first_happened_after_training():
    events = contacts(people=40, events=400)
    targets = torch.arange(350, 370)
    drawn = {
        tuple(p)
        for p in Negatives(events, "inductive", known=200)
        .draw(targets, torch.Generator().manual_seed(0))
        .tolist()
    }
    earlier = links_of(events, range(events.before(350)))
    assert len(drawn) == 20
    assert drawn <= earlier - links_of(events, range(200))


def test_where_too_few_links_are_known_the_rest_is_random():
    events = contacts(people=12, events=60)
    targets = torch.arange(20, 60)
    drawn = Negatives(events, "inductive", known=20).draw(targets, torch.Generator().manual_seed(0))
    assert drawn.shape == (40, 2)
    assert torch.equal(drawn[-1, :1], events.source[59:60]), "the last are random: they keep their sources"


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_generator_draws_the_same_negatives(kind):
    events, targets = contacts(people=12, events=200), torch.arange(120, 160)
    one, two = (
        Negatives(events, kind, known=80).draw(targets, torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(one, two)


def test_rivals_of_a_link_are_other_destinations_of_its_source():
    events, targets = contacts(people=20, events=200), torch.arange(150, 160)
    rivals = Negatives(events, "random").rivals(targets, 6, torch.Generator().manual_seed(0))
    assert rivals.shape == (10, 6)
    for i, row in zip(targets.tolist(), rivals.tolist(), strict=True):
        now = {
            int(events.destination[e])
            for e in range(200)
            if events.time[e] == events.time[i] and events.source[e] == events.source[i]
        }
        assert not now & set(row) and int(events.source[i]) not in row
        met = {d for s, d in links_of(events, range(events.before(150))) if s == events.source[i]} - now
        assert len(set(row[:3]) & met) == min(3, len(met)), "half of them were met before, as TGB draws them"


def test_unknown_kinds_of_negatives_are_refused():
    with pytest.raises(ConfigError, match=r"unknown negatives 'historic'; did you mean 'historical'\?"):
        Negatives(contacts(), "historic")


def test_a_source_that_meets_everyone_has_no_negative():
    events = contacts(
        events=2,
        people=3,
        source=torch.tensor([0, 0]),
        destination=torch.tensor([1, 2]),
        time=torch.zeros(2, dtype=torch.float64),
        directed=False,
    )
    with pytest.raises(DataError, match="p0 meets every possible destination at that moment"):
        Negatives(events, "random").draw(torch.tensor([0]), torch.Generator())


def test_edge_bank_remembers_links_strictly_before():
    events = contacts(people=6, events=50)
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    for i in (0, 13, 30, 49):
        known = links_of(events, (e for e in range(50) if events.time[e] < events.time[i]))
        scores = EdgeBank(events).scores(i, pairs)
        assert scores.tolist() == [float(tuple(p) in known) for p in pairs.tolist()]


def test_edge_bank_with_a_window_forgets():
    events = contacts(people=6, events=50)
    bank, i = EdgeBank(events, seconds=200.0), 40
    recent = links_of(
        events, (e for e in range(50) if events.time[i] - 200 <= events.time[e] < events.time[i])
    )
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    assert bank.scores(i, pairs).tolist() == [float(tuple(p) in recent) for p in pairs.tolist()]
    assert 0 < len(recent) < len(links_of(events, range(50)))


def test_edge_bank_knows_no_direction_where_links_have_none():
    events = contacts(
        events=2,
        people=3,
        source=torch.tensor([1, 0]),
        destination=torch.tensor([0, 2]),
        directed=False,
        time=torch.tensor([0.0, 9.0], dtype=torch.float64),
    )
    assert EdgeBank(events).scores(1, torch.tensor([[0, 1], [1, 0], [0, 2]])).tolist() == [1.0, 1.0, 0.0]


def test_scores_of_a_perfect_and_of_a_blind_predictor():
    events = contacts(people=12, events=200)
    truth = {(i, *p) for i, p in enumerate(events.pairs.tolist())}

    def perfect(start: int, pairs: torch.Tensor) -> torch.Tensor:
        return torch.tensor(
            [
                float(any((i, u, v) in truth for i in range(start, min(start + 20, 200))))
                for u, v in pairs.tolist()
            ]
        )

    found = link_scores(
        perfect, events, range(150, 190), batch=20, kinds=("random", "historical"), known=100, rivals=4
    )
    assert found["random"].ap > 0.8 and found["historical"].ap == 1.0 and found["historical"].auc == 1.0
    blind = link_scores(
        lambda start, pairs: torch.zeros(len(pairs)), events, range(150, 190), batch=20, known=100, rivals=4
    )
    assert set(blind) == set(KINDS)
    for score in blind.values():
        assert score.ap == pytest.approx(0.5) and score.auc == pytest.approx(0.5)
        assert score.mrr == pytest.approx(1 / 3), "the middle of five equal ones"
        assert score.links == 40
