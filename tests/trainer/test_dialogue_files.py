"""What is looked for in files of dialogues before they are loaded."""

import gzip
import json

import pytest

from fspad.trainer.dialogue_files import MOST_LEVELS, check_rows

ROW = {"prompt_ids": [[1], [2]], "messages": [{"role": "user", "content": '[[{{ "quoted" \\ ' * 500}]}


@pytest.mark.parametrize("opener", [open, gzip.open])
def test_rows_of_many_levels_are_refused_and_named(opener, tmp_path):
    path = tmp_path / ("rows.jsonl.gz" if opener is gzip.open else "rows.jsonl")
    deep = "[" * MOST_LEVELS + "]" * MOST_LEVELS
    with opener(path, "wt") as file:
        file.write(json.dumps(ROW) + "\n" + deep + "\n")
    check_rows(path)
    with opener(path, "at") as file:
        file.write('{"a": ' + deep + "}\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl.*:3: expected a dialogue, got a row of more than 100 levels"):
        check_rows(path)


def test_long_rows_with_many_lists_are_read(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"ids": [[i] for i in range(10_000)]}) + "\n")
    check_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("row", ["null", "true", "5", "-1e9", '"x"', '"\\""', "1" * 10_000])
def test_rows_that_are_no_dictionaries_are_refused_and_named(row, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + row + "\n" + json.dumps(ROW) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: expected a dialogue as a dictionary"):
        check_rows(path)
    path.write_text("[\n" + row + "\n]\n")
    check_rows(path)


def test_rows_of_many_different_keys_are_refused_and_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": 'say ": ' * 20}] * 1000
    path.write_text(json.dumps({"messages": turns}) + "\n")
    check_rows(path)
    path.write_text(json.dumps({"messages": [{str(number): 1} for number in range(1001)]}) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: expected a dialogue, got a row of more than 1000 keys"):
        check_rows(path)
