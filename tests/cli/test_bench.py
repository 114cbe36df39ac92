"""`fspad bench`, end to end on tiny models."""

import json
import re

import pytest

import fspad.cli.bench
from fspad.bench.records import read_records, read_setup
from helpers.commands import plain, run
from helpers.dialogues import make_tokenizer
from helpers.models import make_head, make_target


@pytest.fixture
def files(tmp_path):
    """Folders of a target and of two heads, and a file of questions."""
    target = make_target()
    for folder, model in {
        "target": target,
        "head": make_head(target),
        "eagle": make_head(target, seed=1, partial_alignment=False, feature_sampling=False),
    }.items():
        model.save_pretrained(tmp_path / folder)
    make_tokenizer().save_pretrained(tmp_path / "target")
    questions = [
        {"question_id": 1, "category": "writing", "turns": ["hello you", "bye"]},
        {"question_id": 2, "category": "qa", "turns": ["hi you"]},
        {"question_id": 3, "category": "qa", "turns": ["bye now"]},
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    return tmp_path


def bench(files, *more, records="records.jsonl"):
    arguments = ["--target", files / "target", "--head", files / "head", "--questions", files / "questions.jsonl"]
    arguments += ["--records", files / records, "--max-new-tokens", 5, "--dtype", "float32"]
    return run("bench", *arguments, *more)


def test_all_methods_on_all_questions(files):
    options = ("--also", f"eagle={files / 'eagle'}", "--early-exit", 2, "--temperature", 0, "--temperature", 1)
    result = bench(files, *options, "--output", files / "report", "--name", "Some questions")
    assert result.exit_code == 0, result.output
    records = read_records(files / "records.jsonl")
    ours = ["fspad", "fspad-no-lookup", "fspad-chain", "fspad-reference"]
    methods = ["plain", "prompt-lookup", *ours, "eagle", "early-exit"]
    assert {record.method for record in records} == set(methods)
    assert len(records) == 2 * 4 * len(methods)
    assert {(record.prompts, record.task) for record in records} == {
        ("Some questions", "multi-turn conversation"),
        ("Some questions", "qa"),
    }
    setup = read_setup(files / "records.jsonl")
    assert (setup["methods"], setup["early_exit"], setup["dtype"]) == (methods, 2, "float32")
    assert setup["head_sha256"] != setup["also_eagle_sha256"]
    assert "fspad-chain" in result.output
    assert "# Benchmark: Some questions" in (files / "report" / "report.md").read_text()
    greedy = {(r.place, tuple(r.answer.token_ids)) for r in records if r.temperature == 0}
    assert len(greedy) == 4, "in float32 all greedy answers are the plain ones"


def test_an_interrupted_run_goes_on_where_it_stopped(files, monkeypatch):
    stock = fspad.cli.bench.append_record
    appended = []

    def interrupt(path, record):
        if len(appended) == 3:
            raise KeyboardInterrupt
        appended.append(record)
        stock(path, record)

    monkeypatch.setattr(fspad.cli.bench, "append_record", interrupt)
    assert bench(files, "--method", "fspad").exit_code != 0
    monkeypatch.setattr(fspad.cli.bench, "append_record", stock)
    assert bench(files, "--method", "fspad").exit_code == 0
    records = read_records(files / "records.jsonl")
    assert records[:3] == appended
    assert len(records) == len({(record.place, record.method) for record in records}) == 2 * 4


def test_a_file_takes_in_more_questions_and_temperatures(files):
    for number, options in enumerate((("--per-category", 1), ("--temperature", 1), ())):
        result = bench(files, "--method", "fspad", *options)
        assert result.exit_code == 0, result.output
        assert len(read_records(files / "records.jsonl")) == [6, 14, 16][number]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-new-tokens", 6), "max_new_tokens 5, now 6"),
        (("--dtype", "bfloat16"), "dtype 'float32', now 'bfloat16'"),
        (("--turns", "first"), "turns 'all', now 'first'"),
        (("--name", "some"), "prompts 'questions', now 'some'"),
        (("--method", "fspad-chain"), "methods"),
        (("--head", "eagle"), "head_sha256"),
    ],
)
def test_records_of_another_setup_are_refused(files, options, message):
    assert bench(files, "--method", "fspad", "--per-category", 1).exit_code == 0
    options = [files / option if option == "eagle" else option for option in options]
    result = bench(files, "--method", "fspad", *options)
    assert result.exit_code == 1
    assert message in plain(result.output)
    assert "write to a new file" in plain(result.output)


def test_report_of_records(files):
    assert bench(files, "--method", "fspad").exit_code == 0
    result = run("bench", "report", files / "records.jsonl", "--output", files / "report")
    assert result.exit_code == 0, result.output
    assert {path.suffix for path in (files / "report").iterdir()} == {".md", ".png"}
    assert re.search(r"│ 0 \(greedy\) +│ fspad +│", result.output)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--also", "eagle"), "expected `--also NAME=FOLDER`, got 'eagle'"),
        (("--also", "a=b", "--also", "a=c"), "got two of 'a'"),
        (("--method", "medusa"), "expected `--method` to be one of plain, prompt-lookup, fspad"),
        (("--early-exit", 3), "expected `--early-exit` between 1 and 2, got 3"),
        (("--questions", "missing.jsonl"), "No such file"),
        (("--also", "a=missing"), "no head could be loaded from 'missing'"),
    ],
)
def test_mistakes_are_one_line(files, options, message):
    result = bench(files, *options)
    assert result.exit_code == 1
    assert message in plain(result.output)
    assert "Traceback" not in result.output
    assert not (files / "records.jsonl").exists()


def test_questions_and_records_are_needed():
    for arguments in ((), ("--questions", "a.jsonl")):
        result = run("bench", *arguments)
        assert result.exit_code == 1
        assert "expected `--questions FILE --records FILE`" in plain(result.output)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "No such file"), ("", "is empty"), ('{"a": 1}\n', ":1: expected")]
)
def test_report_of_what_is_no_record(tmp_path, text, message):
    if text is not None:
        (tmp_path / "records.jsonl").write_text(text)
    result = run("bench", "report", tmp_path / "records.jsonl", "--output", tmp_path)
    assert result.exit_code == 1
    assert message in plain(result.output)
