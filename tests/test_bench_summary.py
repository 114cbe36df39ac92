"""The figures of a report, on records made by hand."""

import pytest

from fspad.bench.measuring import Answer
from fspad.bench.records import FSPAD, PLAIN, AnswerRecord
from fspad.bench.summary import TimeSplit, summarize_methods

LOOKUP = "prompt-lookup"


def record(method, question_id, task, tokens, seconds, accept_lengths=(), times=(None, None, None), **place):
    answer = Answer([7] * tokens, seconds, list(accept_lengths), *times)
    return AnswerRecord("some", question_id, place.pop("temperature", 0.0), method, answer, task=task, **place)


# Question 1 has two turns: plain 20 tokens in 4 s, with the head 20 tokens in 2 s
RECORDS = [
    record(PLAIN, 1, "math", 10, 1.0, times=(None, 0.75, 0.1)),
    record(FSPAD, 1, "math", 10, 0.5, [5, 4], (0.1, 0.3, 0.1)),
    record(LOOKUP, 1, "math", 10, 1.25, [3, 3, 3], (None, 1.0, 0.1)),
    record(FSPAD, 1, "math", 10, 1.5, [9], (0.2, 0.9, 0.2), turn=2),
    record(PLAIN, 1, "math", 10, 3.0, times=(None, 2.5, 0.2), turn=2),
    record(LOOKUP, 1, "math", 10, 3.0, [3, 6], (None, 2.0, 0.2), turn=2),
    record(PLAIN, 2, "RAG", 5, 1.0, times=(None, 0.5, 0.5)),
    record(FSPAD, 2, "RAG", 4, 1.0, [1, 1, 1], (0.1, 0.3, 0.5)),
    record(PLAIN, 3, "RAG", 5, 1.0, times=(None, 0.5, 0.5)),
    record(FSPAD, 3, "RAG", 5, 0.25, [4], (0.0625, 0.125, 0.0625)),
    record(FSPAD, 4, "RAG", 50, 0.25, [49], (0.0625, 0.125, 0.0625)),  # not answered plainly yet
    record(PLAIN, 1, "math", 10, 2.0, temperature=1.0),
    record(FSPAD, 1, "math", 10, 1.0, [9], temperature=1.0),
]


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
