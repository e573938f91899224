"""Patches of a window: equal counts in the order of time, tokens, edges and counts against loops."""

from __future__ import annotations

import math

import pytest
import torch
from graphs_support import contacts, twin_edges, twin_patches, twin_structure

from ditkit.core.errors import DataError
from ditkit.nn.patches import patchify


@pytest.mark.parametrize(("size", "count"), [(60, 4), (59, 4), (10, 4), (9, 6), (7, 7), (13, 1)])
def test_patches_are_the_window_cut_into_equal_counts(size, count):
    window = contacts().window(60, size)
    made = patchify(*window, count)
    wanted = twin_patches(window, count)
    assert [e for events in wanted for e in events] == list(range(size))
    assert [len(events) for events in wanted[:-1]] == [math.ceil(size / count)] * (len(wanted) - 1)
    assert made.length == len(wanted)
    of_edge = made.patch[made.receiver]
    assert torch.equal(of_edge, made.patch[made.sender])
    for m, events in enumerate(wanted):
        assert sorted(made.event[of_edge == m].tolist()) == sorted(2 * events)
    assert (made.stamp.diff() <= 0).all(), "stamps are ages: the latest event of a later patch is no older"
    assert made.stamp.tolist() == [window.age[events[-1]].item() for events in wanted]


def test_equal_times_never_reorder():
    events = contacts(time=torch.zeros(60, dtype=torch.float64))
    made = patchify(*events.window(60, 60), 5)
    assert torch.equal(made.patch[made.receiver], made.event // 12)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_tokens_and_edges_are_those_of_the_loops(count):
    window = contacts().window(60, 23)
    made = patchify(*window, count)
    tokens = [(int(made.nodes[n]), int(m)) for n, m in zip(made.node, made.patch, strict=True)]
    assert tokens == sorted(tokens) and len(set(tokens)) == len(tokens)
    expected = set()
    for m, events in enumerate(twin_patches(window, count)):
        for n in range(8):
            around = twin_edges(window, events, n)
            if not around:
                assert (n, m) not in tokens, "a node without edges in a patch has no token"
                continue
            expected.add((n, m))
            mine = made.receiver == tokens.index((n, m))
            got = [
                (tokens[s][0], e)
                for s, e in zip(made.sender[mine].tolist(), made.event[mine].tolist(), strict=True)
            ]
            assert sorted(got) == sorted(around)
            for (j, _), counts in zip(got, made.structure[mine].tolist(), strict=True):
                assert counts == twin_structure(window, events, n, j)
    assert set(tokens) == expected
    assert (made.receiver.diff() >= 0).all()
    for n, node in enumerate(made.nodes.tolist()):
        assert tokens[made.last[n]] == max(token for token in tokens if token[0] == node)


def test_common_neighbours_are_counted_inside_the_patch_only():
    # 0 and 1 share the neighbour 2 over the whole window, and in no patch
    events = contacts(
        events=4,
        people=4,
        source=torch.tensor([0, 0, 0, 1]),
        destination=torch.tensor([2, 1, 1, 2]),
        time=torch.arange(4.0).double(),
    )
    whole, parts = (patchify(*events.window(4, 4), count) for count in (1, 2))
    assert whole.structure[whole.event == 1][0, 2] == 1
    assert parts.structure[:, 2].max() == 0


def test_only_the_most_recent_neighbours_are_kept_where_there_is_a_cap():
    window = contacts().window(60, 40)
    every, capped = patchify(*window, 2), patchify(*window, 2, neighbours=3)
    assert torch.equal(every.nodes, capped.nodes) and torch.equal(every.node, capped.node)
    for row in range(len(every.node)):
        mine, kept = every.receiver == row, capped.receiver == row
        assert capped.event[kept].tolist() == every.event[mine].tolist()[-3:]
        assert torch.equal(capped.structure[kept], every.structure[mine][-3:])


def test_a_window_too_small_for_its_patches_is_refused():
    with pytest.raises(DataError, match=r"a window of 3 events, expected at least 4, one a patch"):
        patchify(*contacts().window(3, 50), 4)
