from collections.abc import Callable

import pytest

from ditkit.bench.memory import measure_peak
from ditkit.core.errors import ConfigError, DitkitError

MEGABYTE = 10**6


def allocating(megabytes: int) -> Callable[[], int]:
    return lambda: len(b"\1" * (megabytes * MEGABYTE))


def allocating_first(megabytes: int) -> Callable[[], int]:
    """Set-up that peaks and frees, then a call that needs nothing."""
    assert len(b"\1" * (megabytes * MEGABYTE)) > 0
    return int


def holding(megabytes: int) -> Callable[[], int]:
    """Set-up that keeps its memory, as a loaded model does."""
    held = b"\1" * (megabytes * MEGABYTE)
    return lambda: len(held)


def printing() -> Callable[[], None]:
    print("{not json")
    return lambda: print("nor this")


def failing() -> Callable[[], None]:
    raise ValueError("no such model: 'emojo'")


def not_callable() -> int:
    return 3


def test_a_call_that_allocates_200_mb_peaks_200_mb_above_its_baseline():
    peak = measure_peak(f"{__name__}:allocating", {"megabytes": 200})
    # the kernel adds up resident pages of each CPU in batches: a reading is a fraction of a megabyte off
    assert abs(peak.added_bytes - 200 * MEGABYTE) < 2 * MEGABYTE
    assert peak.peak_bytes == peak.baseline_bytes + peak.added_bytes


def test_what_set_up_keeps_is_baseline_and_what_it_freed_is_forgotten():
    empty = measure_peak(f"{__name__}:holding", {"megabytes": 0})
    held = measure_peak(f"{__name__}:holding", {"megabytes": 200})
    freed = measure_peak(f"{__name__}:allocating_first", {"megabytes": 200})
    assert 195 * MEGABYTE <= held.baseline_bytes - empty.baseline_bytes <= 205 * MEGABYTE
    assert held.added_bytes < 10 * MEGABYTE
    assert freed.peak_bytes < held.peak_bytes - 150 * MEGABYTE


def test_a_large_parent_does_not_show_in_the_child():
    ballast = b"\1" * (400 * MEGABYTE)
    small = measure_peak(f"{__name__}:allocating", {"megabytes": 1})
    assert small.peak_bytes < len(ballast)


def test_output_of_the_measured_code_is_not_taken_for_the_answer():
    assert measure_peak(f"{__name__}:printing", {}).peak_bytes > 0


@pytest.mark.parametrize(
    ("target", "kwargs", "device", "message"),
    [
        ("allocating", {}, "cpu", "'module:function', got 'allocating'"),
        ("a:b:c", {}, "cpu", "got 'a:b:c'"),
        ("m:f", {}, "gpu", "unknown device 'gpu'"),
        ("m:f", {"x": {1, 2}}, "cpu", "cannot be written as JSON"),
    ],
)
def test_bad_requests_are_refused_before_a_process_starts(target, kwargs, device, message):
    with pytest.raises(ConfigError, match=message):
        measure_peak(target, kwargs, device=device)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("failing", "no such model: 'emojo'"),
        ("not_callable", "got int"),
        ("missing", "has no attribute 'missing'"),
    ],
)
def test_a_failure_in_the_process_is_told_in_one_line(target, message):
    with pytest.raises(DitkitError, match=message) as caught:
        measure_peak(f"{__name__}:{target}", {})
    assert "\n" not in str(caught.value)
