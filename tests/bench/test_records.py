"""Measured answers on their way to a file and back."""

import json

import pytest

from fspad.bench.measuring import Answer
from fspad.bench.records import (
    FSPAD,
    PLAIN,
    AnswerRecord,
    append_record,
    begin_records,
    pair_with_plain,
    read_records,
    read_setup,
)

SETUP = {"machine": "Some CPU, 2 cores", "dtype": "bfloat16", "threads": 2, "max_new_tokens": 8}
PLAIN_RECORD = AnswerRecord("Fragen über Züge", 81, 1.0, PLAIN, Answer([5, 6, 7], 3.0), turn=2)
HEAD_RECORD = AnswerRecord(
    "Fragen über Züge", 81, 1.0, FSPAD, Answer([5, 6, 7], 1.5, [2], 0.25, 1.0, 0.125), turn=2, task="math"
)


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    assert begin_records(path, SETUP) == []
    append_record(path, PLAIN_RECORD)
    assert begin_records(path, SETUP) == [PLAIN_RECORD]
    append_record(path, HEAD_RECORD)
    assert read_records(path) == begin_records(path, SETUP) == [PLAIN_RECORD, HEAD_RECORD]
    assert read_setup(path) == SETUP
    line = json.loads(path.read_text(encoding="utf-8").splitlines()[1])
    assert line["prompts"] == "Fragen über Züge"
    assert not {"task", "draft_seconds"} & line.keys(), "what is unknown is left out"


def test_a_half_written_line_is_cut_off(tmp_path):
    path = tmp_path / "results.jsonl"
    begin_records(path, SETUP)
    append_record(path, PLAIN_RECORD)
    append_record(path, HEAD_RECORD)
    whole = path.read_bytes()
    for length in range(0, len(whole) + 1, 7):
        path.write_bytes(whole[:length])
        assert begin_records(path, SETUP) == [PLAIN_RECORD, HEAD_RECORD][: max(0, whole[:length].count(b"\n") - 1)]
        assert read_setup(path) == SETUP
        append_record(path, HEAD_RECORD)
        assert read_records(path)[-1] == HEAD_RECORD


def test_another_setup_is_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    begin_records(path, SETUP)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"another one \(threads 2, now 4; head None, now 'abc'\)"):
        begin_records(path, {**SETUP, "threads": 4, "head": "abc"})
    assert path.read_bytes() == before


def test_files_without_a_setup_are_read_and_not_gone_on_with(tmp_path):
    path = tmp_path / "results.jsonl"
    append_record(path, HEAD_RECORD)
    assert read_records(path) == [HEAD_RECORD]
    assert read_setup(path) == {}
    with pytest.raises(ValueError, match="machine None, now 'Some CPU"):
        begin_records(path, SETUP)


def test_pairs_are_of_one_prompt_turn_and_temperature():
    def record(method, question_id=1, turn=1, temperature=0.0):
        return AnswerRecord("some", question_id, temperature, method, Answer([1], 1.0), turn)

    plain = [record(PLAIN), record(PLAIN, turn=2), record(PLAIN, temperature=1.0)]
    heads = [record(FSPAD), record(FSPAD, turn=2), record(FSPAD, temperature=1.0), record(FSPAD, question_id=2)]
    others = [record("prompt-lookup")]
    expected = list(zip(heads, [*plain, None], strict=True))
    assert pair_with_plain([*heads, *others, *plain], FSPAD) == expected
    assert pair_with_plain(plain, FSPAD) == []


GOOD = {"prompts": "some", "question_id": 1, "temperature": 0.0, "method": "plain", "token_ids": [1], "seconds": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accept_lengths": [2, 0]}, "accept_lengths of at least 1, got 0"),
        ({"seconds": 0.0}, "seconds to be positive, got 0.0"),
        ({"temp": 0.0}, "temp"),
        ({"seconds": None}, "seconds"),
        ({"method": None}, "method"),
        ({"setup": {}}, "setup"),
    ],
)
def test_lines_that_are_no_measured_answer(tmp_path, change, message):
    bad = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(bad) + "\n")
    with pytest.raises(ValueError, match=rf"results\.jsonl:3: expected a measured answer.*{message}"):
        read_records(path)


@pytest.mark.parametrize(("text", "message"), [("\n", "is empty"), ("[1]\n", ":1: expected"), ("{", ":1: expected")])
@pytest.mark.parametrize("read", [read_records, read_setup])
def test_files_without_answers(tmp_path, text, message, read):
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read(path)
