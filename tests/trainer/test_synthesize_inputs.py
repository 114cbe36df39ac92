"""Whatever is wrong with what `fspad synthesize` is given is said in one line."""

import errno
import gzip
import io
import json
import os
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

import fspad.cli.synthesize as command
import fspad.trainer.synthesize as module
from fspad.trainer.resumable import ResumableFile
from fspad.trainer.synthesize import synthesize, write_prompts
from helpers.dialogues import MARKERS
from helpers.synthesis import PROMPTS, make_pair, read, run, save_pair


@pytest.fixture
def folder(tmp_path):
    return save_pair(tmp_path / "target")


def parquet(**columns):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def error_line(result):
    """The one line that a command ends with."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", result.stderr).splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("Error: ")
    return lines[0]


GOOD = b'{"prompt": "hi"}\n'
ROWS = parquet(prompt=["hi"] * 1000)
BINARY = pyarrow.array([b"hi", b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", None, "no such file: .*a.jsonl"),
        ("a.json", None, "no such file: .*a.json"),
        ("a.jsonl.gz", None, "no such file: .*a.jsonl.gz"),
        ("a.parquet", None, "no such file: .*a.parquet"),
        ("a.jsonl", b"", "expected texts in the column `prompt` of .*a.jsonl, got none: name another"),
        ("a.txt", b"\n\n", "expected texts in the column `prompt` of .*a.txt, got none"),
        ("a.parquet", b"", "expected Parquet in .*a.parquet, got what cannot be read"),
        ("a.parquet", parquet(prompt=pyarrow.array([], pyarrow.string())), "a.parquet, got none"),
        ("a.parquet", parquet(question=["hi"]), "expected a column `prompt` in .*a.parquet, got question"),
        ("a.parquet", parquet(prompt=BINARY), "expected Parquet in .*a.parquet, got what cannot be read"),
        ("a.parquet", ROWS[: len(ROWS) // 2], "expected Parquet in .*a.parquet, got what cannot be read"),
        (
            "a.parquet",
            b"PAR1" + b"\xff" * 300 + ROWS[-200:],
            "expected Parquet in .*a.parquet, got what cannot be read",
        ),
        ("a.parquet", GOOD, "expected Parquet in .*a.parquet, got what cannot be read"),
        ("a.jsonl", GOOD + b'{"prompt": "h', r"a.jsonl:2: expected \{\"prompt\": \"...\"\}, got"),
        ("a.jsonl", GOOD + b"[" * 100_000, r"a.jsonl:2: expected \{\"prompt\": \"...\"\}, got"),
        ("a.jsonl", GOOD + b'{"prompt": ' + b"1" * 5000 + b"}", r"a.jsonl:2: expected \{\"prompt\": \"...\"\}, got"),
        ("a.json", b'[\n{"prompt": "hi"}\n]', r"a.json:1: expected \{\"prompt\": \"...\"\}, got"),
        (
            "a.jsonl",
            GOOD + b'{"prompt": "\xff"}\n',
            "expected JSON lines in UTF-8 in .*a.jsonl, got what cannot be read",
        ),
        ("a.jsonl", GOOD.decode().encode("utf-16"), "expected JSON lines in UTF-8 in .*a.jsonl, got what cannot"),
        ("a.jsonl", ROWS, "expected JSON lines in UTF-8 in .*a.jsonl, got what cannot be read"),
        ("a.jsonl.gz", GOOD, "expected JSON lines in UTF-8 in .*a.jsonl.gz, got what cannot be read: Not a gzipped"),
        (
            "a.jsonl.gz",
            gzip.compress(GOOD, mtime=0)[:-9],
            "expected JSON lines in UTF-8 in .*a.jsonl.gz, got what cannot be read",
        ),
        (
            "a.jsonl.gz",
            gzip.compress(GOOD, mtime=0)[:10] + b"\xff" * 20,
            "in UTF-8 in .*a.jsonl.gz, got what cannot be read",
        ),
    ],
)
def test_files_of_prompts(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    # It is said before a target is looked for
    result = run(tmp_path / "d.jsonl", "--prompts", tmp_path / name, "--target", tmp_path / "missing")
    assert re.search(message, error_line(result))
    result = run(tmp_path / "d.jsonl", "--num-prompts", 3, "--exclude", tmp_path / name, "--target", "missing")
    assert re.search(message, error_line(result))


def test_datasets_that_cannot_be_loaded(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.jsonl").write_bytes(GOOD + b'{"prompt": 7, 5')
    for source, message in (("nobody/nothing", "nobody/nothing"), (tmp_path / "broken", "broken, got what cannot be")):
        assert message in error_line(run(tmp_path / "d.jsonl", "--prompts", source))


def test_prompts_that_can_be_read_all_the_same(tmp_path, folder):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD + b'{"prompt": "\\ud83d"}\n')
    result = run(tmp_path / "d.jsonl", "--prompts", tmp_path / "a.jsonl", "--target", folder, "--max-new-tokens", 3)
    assert result.exit_code == 0, result.output
    assert "left out 1 prompts that are no text, the first in row 2." in " ".join(result.output.split())
    assert [row["messages"][0]["content"] for row in read(tmp_path / "d.jsonl")] == ["hi"]


def fail_to_make_folders(monkeypatch):
    def mkdir(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", mkdir)


@pytest.mark.parametrize(
    ("output", "spoil", "message"),
    [
        ("a.jsonl/d.jsonl", None, "in a folder that can be written to, got one in .*a.jsonl, which is a file: name"),
        ("b.jsonl", None, "expected an output file, got the folder .*b.jsonl: name a file in it"),
        (
            "c/d.jsonl",
            lambda m: m.setattr(os, "access", lambda *_: False),
            "got one in .*, which cannot be written to",
        ),
        ("d.txt", None, "ends in .jsonl or .parquet, got .*d.txt"),
    ],
)
def test_output_that_cannot_be_written(output, spoil, message, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "b.jsonl").mkdir()
    if spoil:
        spoil(monkeypatch)
    # It is said before a target is looked for
    result = run(tmp_path / output, "--num-prompts", 3, "--target", tmp_path / "missing")
    assert re.search(message, error_line(result))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_output_that_turns_out_not_to_be_writable(tmp_path, folder, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    fail_to_make_folders(monkeypatch)
    result = run(
        tmp_path / "new" / "d.jsonl", "--prompts", tmp_path / "a.jsonl", "--target", folder, "--max-new-tokens", 8
    )
    assert "could not write to" in error_line(result)
    assert "(Permission denied)" in error_line(result)
    assert "see to it that it can be written to, and run the same again" in error_line(result)


def test_full_disk(tmp_path, folder, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(b"".join(b'{"prompt": "%s"}\n' % text.encode() for text in PROMPTS))
    options = ("--prompts", tmp_path / "a.jsonl", "--target", folder, "--batch-size", 2, "--max-new-tokens", 4)
    stock, appended = Path.open, []

    def open_on_a_full_disk(path, mode="r", *arguments, **kwargs):
        file = stock(path, mode, *arguments, **kwargs)
        if mode == "ab":
            appended.append(path)
            if len(appended) == 2:
                file.close()
                file = io.open("/dev/full", "ab")  # noqa: SIM115, UP020
        return file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_on_a_full_disk)
        result = run(tmp_path / "d.jsonl", *options)
    assert "(No space left on device). What was written before is kept: make room, and run the same" in error_line(
        result
    )
    rows = read(tmp_path / "d.jsonl")
    assert len(rows) == 2
    assert "Wrote 3 dialogues" in run(tmp_path / "d.jsonl", *options).output
    assert sorted(row["index"] for row in read(tmp_path / "d.jsonl")) == [0, 1, 2, 3, 4]


def usage_error(result):
    """What typer says of an argument, in a box."""
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", "", result.stderr).split())


@pytest.mark.parametrize("temperature", ["-1", "-inf", "hot"])
def test_temperatures_that_are_no_numbers_or_negative(temperature, tmp_path):
    result = run(tmp_path / "d.jsonl", "--num-prompts", 3, "--temperature", temperature, "--target", "missing")
    assert "Error Invalid value for '--temperature'" in usage_error(result)


def test_temperatures_that_are_not_finite(tmp_path):
    arguments = ("--num-prompts", 3, "--temperature", 0, "--temperature", "inf", "--target", "missing")
    expected = "expected temperatures of 0 (greedy) or more, got inf; 1 samples as the target was trained."
    assert error_line(run(tmp_path / "d.jsonl", *arguments)) == f"Error: {expected}"
    for temperatures, got in (([], "none"), ([1.0, float("nan")], "nan"), ([-1.0], "-1.0")):
        with pytest.raises(ValueError, match=f"or more, got {got}; 1 samples"):
            synthesize(*make_pair(), PROMPTS, tmp_path / "d.jsonl", temperatures)


@pytest.mark.parametrize("source", ["--prompts", "--num-prompts"])
@pytest.mark.parametrize(("max_new_tokens", "exit_code"), [(512, 1), (10**6, 1), (0, 2), (-3, 2)])
def test_lengths_out_of_range(source, max_new_tokens, exit_code, tmp_path, folder):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    arguments = (source, 3 if source == "--num-prompts" else tmp_path / "a.jsonl")
    result = run(tmp_path / "d.jsonl", *arguments, "--target", folder, "--max-new-tokens", max_new_tokens)
    if exit_code == 2:
        assert "Error Invalid value for '--max-new-tokens'" in usage_error(result)
    else:
        assert (
            "expected `max_new_tokens` above 0 and below 512, the target's `max_position_embeddings`, which have to hold "
            f"a prompt too, got {max_new_tokens};"
        ) in error_line(result)
    # Nothing was written, prompts included
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "target"]


def test_targets_without_room_for_a_prompt_of_their_own(tmp_path):
    target, tokenizer = make_pair(max_position_embeddings=20)
    message = r"at most 1 tokens before the user's turn, .* `max_position_embeddings`, got 2; pass prompts instead"
    tokenizer.chat_template = "now " + MARKERS
    with pytest.raises(ValueError, match=message):
        write_prompts(target, tokenizer, 3, tmp_path / "p.jsonl", max_new_tokens=19)
    assert write_prompts(target, tokenizer, 1, tmp_path / "p.jsonl", max_new_tokens=18)


@pytest.mark.parametrize("source", ["--prompts", "--num-prompts"])
@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "expected a tokenizer with a chat template, got one without: set `tokenizer.chat_template`, or name a"),
        (
            "{{ raise_exception('no users') }}",
            "expected messages that the chat template can render, got .*: no users;",
        ),
        ("{{ messages[0].content + 1 }}", "expected messages that the chat template can render"),
        ("{{ messages[0].content.no() }}", "expected messages that the chat template can render"),
        ("{% for", "expected messages that the chat template can render"),
        ("", "expected a chat template"),
        ("  ", "expected a chat template"),
    ],
)
def test_chat_templates_that_fail(template, source, message, tmp_path):
    target, tokenizer = make_pair()
    tokenizer.chat_template = template
    target.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    arguments = (source, 3 if source == "--num-prompts" else tmp_path / "a.jsonl")
    result = run(tmp_path / "d.jsonl", *arguments, "--target", tmp_path / "target", "--max-new-tokens", 8)
    assert re.search(message, error_line(result))


def test_tokens_that_the_target_has_no_embedding_of(tmp_path, monkeypatch):
    target, tokenizer = make_pair()
    tokenizer.add_tokens(["more"])  # the thirteenth, as the target has twelve
    file = tmp_path / "d.jsonl"
    assert synthesize(target, tokenizer, ["hello", "bye"], file, max_new_tokens=3) == 2
    before = file.read_bytes()
    monkeypatch.setattr(module, "complete", lambda *_: pytest.fail("generated"))
    message = (
        r"token ids below 12, the number of the target's embeddings, got 12 in prompt 2 \('hi more'\); load the tokenizer "
        "that belongs to the target"
    )
    with pytest.raises(ValueError, match=message):
        synthesize(target, tokenizer, ["hello", "bye", "hi more"], file, max_new_tokens=3)
    assert file.read_bytes() == before
    tokenizer.chat_template = "more " + MARKERS
    with pytest.raises(ValueError, match=r"got 12 in what the chat template writes before the user's turn \('more <u"):
        write_prompts(target, tokenizer, 2, tmp_path / "p.jsonl")
    assert not (tmp_path / "p.jsonl").exists()


def test_targets_that_give_nan(tmp_path):
    target, tokenizer = make_pair()
    with torch.no_grad():
        target.get_input_embeddings().weight.fill_(float("nan"))
    target.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    options = ("--dtype", "bfloat16", "--max-new-tokens", 8)
    result = run(tmp_path / "d.jsonl", "--num-prompts", 3, "--target", tmp_path / "target", *options)
    assert "expected finite logits from LlamaForCausalLM in bfloat16, got NaN" in error_line(result)


@pytest.mark.parametrize("settings", ["{", "[1]", b"\xff", "[" * 100_000])
def test_damaged_settings(settings, tmp_path):
    target, tokenizer = make_pair()
    file = tmp_path / "d.jsonl"
    synthesize(target, tokenizer, ["hello"], file, max_new_tokens=3)
    beside = tmp_path / "d.jsonl.settings.json"
    beside.write_bytes(settings if isinstance(settings, bytes) else settings.encode())
    with pytest.raises(ValueError, match=r"expected .*settings.json, .* got what cannot be read: write to a new file"):
        synthesize(target, tokenizer, ["hello"], file, max_new_tokens=3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("5", "d.jsonl:1: expected a row, got b'5"),
        ("[" * 100_000, r"d.jsonl:1: expected a row, got b'\[\["),
        (b'{"a": "\xff"}', "d.jsonl:1: expected a row, got"),
        ("{}", "in line 1: write to a new file"),
        ('{"index": "0", "prompt": 7}', "in line 1: write to a new file"),
        ('{"index": -1, "messages": [{"content": "bye"}]}', "in line 1: write to a new file"),
        ('{"index": 0, "messages": []}', "in line 1: write to a new file"),
    ],
)
def test_damaged_rows(row, message, tmp_path):
    target, tokenizer = make_pair()
    for name, work in (("dialogs", synthesize), ("prompts", write_prompts)):
        what = ["hello", "bye"] if work is synthesize else 2
        file = tmp_path / name / "d.jsonl"
        work(target, tokenizer, what, file, max_new_tokens=8)
        file.write_bytes((row if isinstance(row, bytes) else row.encode()) + b"\n")
        with pytest.raises(ValueError, match=message):
            work(target, tokenizer, what, file, max_new_tokens=8)


def test_damaged_parquet(tmp_path):
    ResumableFile(tmp_path / "d.parquet", {"seed": 0}).finish()
    (tmp_path / "d.parquet").write_bytes(ROWS[: len(ROWS) // 2])
    with pytest.raises(
        ValueError, match=r"expected Parquet in .*d.parquet, got what cannot be read: .*; write to a new"
    ):
        ResumableFile(tmp_path / "d.parquet", {"seed": 0})
    assert not (tmp_path / "d.parquet.jsonl").exists()


def test_settings_are_checked_before_prompts_are_written(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(command, "write_prompts", lambda *_, **__: pytest.fail("wrote prompts"))
    result = run(tmp_path / "d.jsonl", "--num-prompts", 3, "--target", folder, "--max-new-tokens", 600)
    assert "got 600" in error_line(result)
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 512
