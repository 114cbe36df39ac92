"""The target writes training data."""

import gzip
import logging
import signal
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from datasets import Dataset, load_dataset

import fspad.trainer.synthesize as module
from fspad.cli.synthesize import load_prompts
from fspad.trainer.data import prepare_dataset
from fspad.trainer.synthesize import synthesize, write_prompts
from helpers import fresh
from helpers.dialogues import WORDS
from helpers.synthesis import PROMPTS, make_pair, read, run, save_pair

MANY_PROMPTS = [" ".join(words) for length in (1, 2, 3) for words in product(WORDS[5:10], repeat=length)]


@pytest.fixture
def folder(tmp_path):
    return save_pair(tmp_path / "target")


def plain(text):
    return " ".join(text.split())


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_are_what_the_trainer_reads(tmp_path, suffix):
    target, tokenizer = make_pair()
    path = tmp_path / "new" / f"dialogs.{suffix}"
    assert synthesize(target, tokenizer, PROMPTS, path, batch_size=2, max_new_tokens=6) == 5
    dataset = load_dataset({"jsonl": "json"}.get(suffix, suffix), data_files=str(path), split="train")
    assert dataset.column_names == ["index", "temperature", "messages", "prompt_ids", "response_ids"]
    rows = sorted(dataset, key=lambda row: row["index"])
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["temperature"] for row in rows] == [0.0, 1.0, 0.0, 1.0, 0.0]
    for row, prompt in zip(rows, PROMPTS, strict=True):
        assert row["messages"][0] == {"role": "user", "content": prompt}
        assert row["messages"][1]["role"] == "assistant"
        text = f"<user> {prompt} </s> end <assistant>"
        assert row["prompt_ids"] == [WORDS.index(word) for word in text.split()]
        assert 1 <= len(row["response_ids"]) <= 6
    prepared = prepare_dataset(dataset.filter(lambda row: len(row["response_ids"]) > 1), None)
    ids = [row["prompt_ids"] + row["response_ids"] for row in dataset if len(row["response_ids"]) > 1]
    assert prepared["input_ids"][:] == ids


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_cut_file_is_gone_on_with(tmp_path, batch_size):
    target, tokenizer = make_pair()
    path = tmp_path / "dialogs.jsonl"
    arguments = {"temperatures": [0.0, 1.0, 0.5], "batch_size": batch_size, "max_new_tokens": 6}
    synthesize(target, tokenizer, PROMPTS, path, **arguments)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:17])
    torch.manual_seed(5)
    assert synthesize(target, tokenizer, PROMPTS, path, **arguments) == 2
    assert path.read_bytes() == whole
    assert synthesize(target, tokenizer, PROMPTS, path, **arguments) == 0
    assert synthesize(target, tokenizer, [*PROMPTS, "hi"], path, **arguments) == 1
    assert path.read_bytes().startswith(whole)
    path.write_bytes(b"nonsense\n" + whole)
    with pytest.raises(ValueError, match=r"dialogs.jsonl:1: expected a row, got b'nonsense"):
        synthesize(target, tokenizer, PROMPTS, path, **arguments)


def test_parquet_is_gone_on_with(tmp_path, monkeypatch):
    target, tokenizer = make_pair()
    path, other = tmp_path / "dialogs.parquet", tmp_path / "other.jsonl"
    arguments = {"batch_size": 2, "max_new_tokens": 6}
    synthesize(target, tokenizer, [*PROMPTS, "hi"], other, **arguments)

    stock = module.complete
    with monkeypatch.context() as patch:
        calls = iter(range(9))
        patch.setattr(module, "complete", lambda *a: stock(*a) if next(calls) < 2 else pytest.fail("interrupted"))
        with pytest.raises(pytest.fail.Exception, match="interrupted"):
            synthesize(target, tokenizer, PROMPTS, path, **arguments)
    assert not path.exists()
    assert synthesize(target, tokenizer, PROMPTS, path, **arguments) == 1
    assert sorted(file.name for file in tmp_path.glob("dialogs*")) == [path.name, f"{path.name}.settings.json"]
    assert synthesize(target, tokenizer, [*PROMPTS, "hi"], path, **arguments) == 1
    rows = Dataset.from_parquet(str(path)).to_list()
    assert sorted(rows, key=lambda row: row["index"]) == sorted(read(other), key=lambda row: row["index"])


def test_full_disk_leaves_what_can_be_gone_on_with(tmp_path):
    target, tokenizer = make_pair()
    arguments = {"batch_size": 16, "max_new_tokens": 6}
    whole, path = tmp_path / "whole.jsonl", tmp_path / "dialogs.jsonl"
    synthesize(target, tokenizer, MANY_PROMPTS, whole, **arguments)
    limit = whole.stat().st_size // 2
    assert limit > 10_000  # well above what the test's own output is
    with file_size_limit(limit), pytest.raises(OSError, match=r"make room, and run the same again to go on"):
        synthesize(target, tokenizer, MANY_PROMPTS, path, **arguments)
    assert path.read_bytes() == whole.read_bytes()[:limit]
    assert 0 < synthesize(target, tokenizer, MANY_PROMPTS, path, **arguments) < len(MANY_PROMPTS)
    key = lambda row: row["index"]  # noqa: E731
    assert sorted(read(path), key=key) == sorted(read(whole), key=key)


@contextmanager
def file_size_limit(size):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_answers_to_other_prompts_are_not_gone_on_with(tmp_path):
    target, tokenizer = make_pair()
    file = tmp_path / "dialogs.jsonl"
    synthesize(target, tokenizer, ["hello you", "bye you"], file, max_new_tokens=3)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="one to another prompt in line 1"):
        synthesize(target, tokenizer, ["now", "hi hi"], file, max_new_tokens=3)
    assert file.read_bytes() == before


def test_other_settings_are_not_gone_on_with(tmp_path):
    target, tokenizer = make_pair()
    file = tmp_path / "dialogs.jsonl"
    arguments = {"temperatures": [0, 1], "max_new_tokens": 3, "seed": 4}
    synthesize(target, tokenizer, PROMPTS[:2], file, **arguments)
    before = file.read_bytes()
    other = make_pair()[0]
    other.config._name_or_path = "some/other"
    for changes, message in [
        ({"temperatures": [1.0]}, r"temperatures \[0.0, 1.0\], now \[1.0\]"),
        ({"max_new_tokens": 4}, "max_new_tokens 3, now 4"),
        ({"seed": 5}, "seed 4, now 5"),
        ({"target": other}, "target '', now 'some/other'"),
        ({"target": make_pair()[0].bfloat16()}, "dtype 'float32', now 'bfloat16'"),
    ]:
        with pytest.raises(ValueError, match=message):
            synthesize(
                **{"target": target, **arguments, **changes}, tokenizer=tokenizer, prompts=PROMPTS, output_file=file
            )
    assert file.read_bytes() == before
    assert synthesize(target, tokenizer, PROMPTS, file, **arguments, batch_size=1) == 3
    (tmp_path / "dialogs.jsonl.settings.json").unlink()
    with pytest.raises(ValueError, match="which says how"):
        synthesize(target, tokenizer, PROMPTS, file, **arguments)
    # Nothing of the other settings is left in an empty file
    file.write_bytes(b"")
    assert synthesize(target, tokenizer, PROMPTS, file, max_new_tokens=4) == 5


def test_prompts_without_room_for_the_answer_are_left_out(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    target, tokenizer = make_pair("gpt2", n_positions=12)
    file = tmp_path / "dialogs.jsonl"
    # With 4 tokens of the template, a prompt of 3 words and an answer of 5 tokens have just enough room.
    assert synthesize(target, tokenizer, ["hi hi hi", "hi hi hi hi", "you"], file, [1.0], max_new_tokens=5) == 2
    assert {row["index"] for row in read(file)} == {0, 2}
    assert "Left out 1 of 3 prompts: they must have at most 7 tokens" in caplog.text
    with pytest.raises(ValueError, match="got 1 that are all longer"):
        synthesize(target, tokenizer, ["hi hi hi hi"], tmp_path / "b.jsonl", [1.0], max_new_tokens=5)


def test_batches_hold_prompts_of_like_length(tmp_path, monkeypatch):
    target, tokenizer = make_pair()
    stock, lengths = module.complete, []
    monkeypatch.setattr(module, "complete", lambda t, p, *rest: lengths.append([*map(len, p)]) or stock(t, p, *rest))
    prompts = [" ".join(["hi"] * (1 + 7 * i % 16)) for i in range(16)]
    synthesize(target, tokenizer, prompts, tmp_path / "dialogs.jsonl", batch_size=4, max_new_tokens=2)
    assert [max(batch) - min(batch) for batch in lengths] == [3] * 4


def test_target_writes_prompts(tmp_path):
    target, tokenizer = make_pair()
    path = tmp_path / "prompts.jsonl"
    prompts = write_prompts(target, tokenizer, 5, path, batch_size=16, max_new_tokens=8)
    assert prompts == [row["prompt"] for row in read(path)]
    assert len(set(prompts)) == 5
    special = set(tokenizer.all_special_tokens)
    assert all(prompt.strip() and not special & set(prompt.split()) for prompt in prompts)


@pytest.mark.parametrize("kept", [0, 1, 4, 7])
def test_writing_prompts_goes_on(tmp_path, kept):
    target, tokenizer = make_pair()
    arguments = {"batch_size": 4, "max_new_tokens": 8}
    whole, path = tmp_path / "whole.jsonl", tmp_path / "prompts.jsonl"
    expected = write_prompts(target, tokenizer, 12, whole, **arguments)
    torch.manual_seed(5)
    write_prompts(target, tokenizer, 7, path, **arguments)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:kept]) + b'{"index": 3, "pro')
    torch.manual_seed(5)
    assert write_prompts(target, tokenizer, 12, path, **arguments) == expected
    assert path.read_bytes() == whole.read_bytes()
    assert write_prompts(target, tokenizer, 3, path, **arguments) == expected
    with pytest.raises(ValueError, match="seed 0, now 1"):
        write_prompts(target, tokenizer, 12, path, **arguments, seed=1)
    assert write_prompts(target, tokenizer, 5, tmp_path / "other.jsonl", **arguments, seed=1) != expected[:5]


def test_attempts_are_made_once_in_whole_batches(tmp_path, monkeypatch):
    target, tokenizer = make_pair()
    path = tmp_path / "prompts.jsonl"
    write_prompts(target, tokenizer, 6, path, batch_size=8, max_new_tokens=8)
    last = read(path)[-1]["index"]
    assert (last + 1) % 8  # in the middle of a batch

    # What is drawn again comes out differently, as it may in bfloat16.
    stock, seeds = module.complete, []

    def other_draws(*arguments):
        seeds.extend(arguments[-1])
        return stock(*arguments[:-1], [seed + "!" for seed in arguments[-1]])

    monkeypatch.setattr(module, "complete", other_draws)
    write_prompts(target, tokenizer, 9, path, batch_size=8, max_new_tokens=8)
    indices = [row["index"] for row in read(path)]
    assert indices == sorted(set(indices))
    assert seeds[0] == f"0 prompt {last // 8 * 8}"


def test_target_that_cannot_write_prompts(tmp_path):
    target, tokenizer = make_pair()
    with torch.no_grad():
        target.get_output_embeddings().weight.zero_()
    target.get_output_embeddings().bias = torch.nn.Parameter(torch.tensor([0.0, 50.0] + [0.0] * (len(WORDS) - 2)))
    with pytest.raises(ValueError, match="got none in 320 attempts after 0"):
        write_prompts(target, tokenizer, 1, tmp_path / "prompts.jsonl", batch_size=64, max_new_tokens=4)
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match="text before the user's turn"):
        write_prompts(target, tokenizer, 1, tmp_path / "prompts.jsonl", max_new_tokens=4)


# The command, that ends in the middle of a batch of the file that is named first
KILLED = """
import os, signal, sys
from fspad.cli import app
from fspad.trainer.resumable import ResumableFile

append = ResumableFile.append

def append_or_die(file, rows):
    append(file, rows)
    if file.path.name == sys.argv[1] and file.path.read_bytes().count(b"\\n") >= 9:
        with file.path.open("ab") as half:
            half.write(b'{"index": 2')
        os.kill(os.getpid(), signal.SIGKILL)

ResumableFile.append = append_or_die
app(sys.argv[2:])
"""


def test_killed_command_goes_on(folder, tmp_path):
    options = ("--num-prompts", 14, "--target", folder, "--batch-size", 2, "--max-new-tokens", 24, "--seed", 3)
    whole = tmp_path / "whole" / "dialogs.jsonl"
    assert run(whole, *options).exit_code == 0
    assert len(read(whole)) == 14

    # One is killed while it writes prompts, and one while it answers them
    outputs = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    killed = [outputs[0].with_suffix(".prompts.jsonl"), outputs[1]]
    for file, output in zip(killed, outputs, strict=True):
        process = fresh.start(
            KILLED, tmp_path, tmp_path / "log", file.name, "synthesize", "--output", output, *options
        )
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "log.err").read_text()
        assert 9 <= file.read_bytes().count(b"\n") < 14
        result = run(output, *options)
        assert result.exit_code == 0, result.output
        assert output.read_bytes() == whole.read_bytes()
        assert output.with_suffix(".prompts.jsonl").read_bytes() == whole.with_suffix(".prompts.jsonl").read_bytes()

    more = run(outputs[0], *options, "--num-prompts", 18)
    assert "Wrote 4 dialogues" in plain(more.output)
    assert outputs[0].read_bytes().startswith(whole.read_bytes())


def test_command_answers_what_is_not_held_out(folder, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "hi"}\n\n{"prompt": null}\n{"prompt": " "}\n{"prompt": "bye"}\n')
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('{"prompt": "you"}\n{"prompt": "hi"}\n')
    Dataset.from_dict({"prompt": ["now", None, "you now"]}).to_parquet(tmp_path / "c.parquet")
    (tmp_path / "held-out.jsonl").write_text('{"prompt": "bye\\n"}\n')
    sources = [f"--prompts={tmp_path / name}" for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")]
    options = ("--exclude", tmp_path / "held-out.jsonl", "--target", folder, "--max-new-tokens", 4)
    output = tmp_path / "dialogs.parquet"
    result = run(output, *sources, *options, "--temperature", 0, "--temperature", 0.5, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    text = plain(result.output)
    assert "left out 2 prompts that are no text, the first in row 3." in text
    assert "left out 1 prompts that are no text, the first in row 2." in text
    assert "1 prompts are there more than once" in text
    assert "1 prompts are held out" in text
    assert "Wrote 4 dialogues" in text
    rows = sorted(Dataset.from_parquet(str(output)), key=lambda row: row["index"])
    assert [row["messages"][0]["content"] for row in rows] == ["hi", "you", "now", "you now"]
    assert [row["temperature"] for row in rows] == [0.0, 0.5, 0.0, 0.5]
    result = run(output, *sources, *options, "--temperature", 0.5)
    assert result.exit_code == 1
    assert plain(result.output).count("dtype 'bfloat16', now 'float32'") == 1
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("d.jsonl",), "got neither"),
        (("d.jsonl", "--num-prompts", 3, "--prompts", "a.jsonl"), "got both"),
        (("d.txt", "--num-prompts", 3), "ends in .jsonl or .parquet, got d.txt"),
        (("d.jsonl", "--prompts", "missing.jsonl"), "no such file: missing.jsonl"),
        (("d.jsonl", "--prompts", "missing.parquet"), "no such file: missing.parquet"),
    ],
)
def test_command_says_what_is_missing(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in plain(result.output)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "hi"}\n{"question": "hi"}\n', r'a.jsonl:2: expected \{"prompt": "..."\}, got .*question'),
        ('{"prompt": "hi"}\nhi\n', "a.jsonl:2: expected"),
        ('["prompt"]\n', "a.jsonl:1: expected"),
        ('{"prompt": 7}\n', "got none"),
        ("", "got none"),
    ],
)
def test_files_without_prompts(tmp_path, text, message):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_prompts([str(path)])


def test_damaged_file_of_prompts(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "hi"}\n')[:-9])
    with pytest.raises(ValueError, match="got what cannot be read"):
        load_prompts([str(path)])


def test_prompts_of_the_hub(monkeypatch):
    import datasets

    asked = []
    dataset = Dataset.from_dict({"prompt": ["hi", "bye"], "other": [1, 2]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **kw: asked.append((a, kw)) or dataset)
    assert load_prompts(["some/dataset"], "train_sft") == ["hi", "bye"]
    assert asked == [(("some/dataset",), {"split": "train_sft"})]
    dataset = dataset.rename_column("prompt", "question")
    with pytest.raises(ValueError, match="expected a column `prompt` in some/dataset, got question, other"):
        load_prompts(["some/dataset"])
