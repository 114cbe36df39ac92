"""The figures of a report, on records made by hand."""

import pytest

from fspad.bench.records import FSPAD, PLAIN
from fspad.bench.summary import TimeSplit, summarize_methods
from helpers.bench_records import LOOKUP, RECORDS


@pytest.fixture
def rows():
    return {(row.temperature, row.task, row.method): row for row in summarize_methods(RECORDS)}


def test_wholes_before_tasks_and_plain_before_others(rows):
    assert list(rows) == [
        (0.0, None, PLAIN),
        (0.0, None, FSPAD),
        (0.0, None, LOOKUP),
        (0.0, "math", PLAIN),
        (0.0, "math", FSPAD),
        (0.0, "math", LOOKUP),
        (0.0, "RAG", PLAIN),
        (0.0, "RAG", FSPAD),
        (1.0, None, PLAIN),
        (1.0, None, FSPAD),
        (1.0, "math", PLAIN),
        (1.0, "math", FSPAD),
    ]


def test_speedups_are_of_questions_with_all_of_their_turns(rows):
    whole, math = rows[0.0, None, FSPAD], rows[0.0, "math", FSPAD]
    assert whole.speedups == pytest.approx([2.0, 0.8, 4.0])
    assert (whole.mean, whole.median, whole.least) == pytest.approx((6.8 / 3, 2.0, 0.8))
    assert math.speedups == pytest.approx([2.0])
    assert rows[0.0, None, LOOKUP].speedups == pytest.approx([4 / 4.25])
    assert rows[0.0, None, PLAIN].speedups == pytest.approx([1.0] * 3)


def test_tau_is_of_all_steps(rows):
    assert rows[0.0, None, FSPAD].comparison.tau == pytest.approx(25 / 7)
    assert rows[0.0, "RAG", FSPAD].comparison.tau == pytest.approx(7 / 4)
    assert rows[0.0, None, LOOKUP].comparison.tau == pytest.approx(18 / 5)
    assert rows[0.0, None, PLAIN].comparison.tau == 1.0


def test_same_as_plain(rows):
    comparison = rows[0.0, None, FSPAD].comparison
    assert (comparison.num_identical, len(comparison.plain)) == (3, 4)


def test_time_split(rows):
    assert vars(rows[0.0, "math", FSPAD].split) == pytest.approx(vars(TimeSplit(0.3 / 20, 1.2 / 20, 0.5 / 20)))
    assert vars(rows[0.0, None, LOOKUP].split) == pytest.approx(vars(TimeSplit(0.0, 3.0 / 20, 1.25 / 20)))
    assert vars(rows[0.0, "math", PLAIN].split) == pytest.approx(vars(TimeSplit(0.0, 3.25 / 20, 0.75 / 20)))
    assert rows[1.0, None, FSPAD].split is None, "not recorded"


def test_efficiency(rows):
    # Plain: 18 steps in 4.0 - 0.3 s; with the head: 3 steps of 0.4 s with 6 tokens each
    math = rows[0.0, "math", FSPAD].comparison
    assert math.efficiency == pytest.approx(2.0 / (6 * (3.7 / 18) / 0.4))
    assert rows[1.0, None, FSPAD].comparison.efficiency is None


def test_tasks_are_told_if_there_are_several():
    rows = summarize_methods([record for record in RECORDS if record.task == "math"])
    assert {row.task for row in rows} == {None}


def test_without_plain_answers_nothing_can_be_compared():
    with pytest.raises(ValueError, match="expected plain answers to compare with, got none"):
        summarize_methods([record for record in RECORDS if record.method != PLAIN])
    with pytest.raises(ValueError, match="got none"):
        summarize_methods([])
