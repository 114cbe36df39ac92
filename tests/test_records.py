"""Measured answers on their way to a file and back."""

import json

import pytest

from fspad.bench.measuring import Answer, Comparison
from fspad.bench.records import AnswerRecord, read_records, records_of, write_records

PLAIN = [Answer([5, 6, 7], 3.0, []), Answer([8, 9], 2.0, [])]
ASSISTED = [Answer([5, 6, 7], 1.5, [2], 0.25, 1.0), Answer([8, 1], 1.0, [1], 0.5, 0.25)]


def test_records_of_a_comparison():
    first, second = records_of(Comparison(PLAIN, ASSISTED), "Spec-Bench", 1.0, task="math")
    assert first == AnswerRecord(
        prompts="Spec-Bench",
        temperature=1.0,
        accept_lengths=[2],
        num_tokens=3,
        seconds=1.5,
        task="math",
        draft_seconds=0.25,
        verify_seconds=1.0,
        plain_num_tokens=3,
        plain_seconds=3.0,
        is_identical=True,
    )
    assert (second.num_tokens, second.plain_num_tokens, second.is_identical) == (2, 2, False)
    (alone,) = records_of(Comparison([], ASSISTED[:1]), "Spec-Bench", 0.0)
    assert (alone.plain_num_tokens, alone.plain_seconds, alone.is_identical, alone.task) == (None, None, None, None)


def test_what_is_written_is_read_again(tmp_path):
    records = records_of(Comparison(PLAIN, ASSISTED), "Fragen über Züge", 0.0)
    path = tmp_path / "results.jsonl"
    write_records(path, records[:1])
    write_records(path, records[1:])
    assert read_records(path) == records
    line = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert line["prompts"] == "Fragen über Züge"
    assert "task" not in line, "what is unknown is left out"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accept_lengths": [2, 0]}, "accept_lengths of at least 1, got 0"),
        ({"seconds": 0.0}, "seconds to be positive, got 0.0"),
        ({"plain_seconds": 1.0}, "got None and 1.0: add the other"),
        ({"temp": 0.0}, "temp"),
        ({"seconds": None}, "seconds"),
    ],
)
def test_lines_that_are_no_measured_answer(tmp_path, change, message):
    good = {"prompts": "some", "temperature": 0.0, "accept_lengths": [2], "num_tokens": 3, "seconds": 1.0}
    bad = {name: value for name, value in {**good, **change}.items() if value is not None}
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(good) + "\n\n" + json.dumps(bad) + "\n")
    with pytest.raises(ValueError, match=rf"results\.jsonl:3: expected an object with some of prompts.*{message}"):
        read_records(path)


@pytest.mark.parametrize(("text", "message"), [("\n", "is empty"), ("[1]\n", ":1: expected an object"), ("{", ":1:")])
def test_files_without_answers(tmp_path, text, message):
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_records(path)
