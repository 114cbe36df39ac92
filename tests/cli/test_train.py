"""`fspad train`: what it reads, and what it goes on from."""

import errno
import gzip
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fspad import FSPADModel
from fspad.cli import app
from fspad.cli.train import DataArguments, load_parts, make_trainer
from fspad.trainer import features as features_module
from fspad.trainer.checks import find_checkpoint
from helpers import fresh
from helpers.dialogues import CHAT, make_tokenizer
from helpers.models import make_target

ROWS = [{"prompt_ids": [1, 2, n], "response_ids": [3, 4, 5 + n, 6, 7]} for n in range(12)]


@pytest.fixture(autouse=True)
def _datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def target(tmp_path) -> Path:
    """Folder of a tiny target whose tokenizer has a chat template."""
    make_target().save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    return tmp_path / "target"


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def dialogues(tmp_path) -> Path:
    path = tmp_path / "dialogues.jsonl"
    path.write_text(lines(ROWS))
    return path


def arguments(folder: Path, target: Path, dialogues: Path, *more: object) -> list[str]:
    values = ["--output_dir", folder / "head", "--target", target, "--train_file", dialogues, "--use_cpu"]
    values += ["--report_to", "none", "--per_device_train_batch_size", 4, "--warmup_steps", 0, "--disable_tqdm", True]
    values += ["--num_draft_tokens", "auto"]
    return [str(value) for value in [*values, *more]]


def refused(folder, target, dialogues, *more) -> str:
    """The one line that the command fails with."""
    result = CliRunner().invoke(app, ["train", *arguments(folder, target, dialogues, "--max_steps", 1, *more)])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.stderr)
    assert "Failed to" not in text, "datasets says it in its own words too"
    (message,) = [line for line in text.splitlines() if line.startswith("Error: ")]
    assert text.rstrip().endswith(message)
    return message


GZIPPED = gzip.compress(lines(ROWS * 50).encode())


def test_disk_without_room_for_the_cache(tmp_path, dialogues, monkeypatch):
    def write(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.write_table", write)
    assert refused(tmp_path, "target", dialogues) == "Error: [Errno 28] No space left on device"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.jsonl.gz", GZIPPED[: len(GZIPPED) // 2], "Compressed file ended before"),
        ("damaged.jsonl.gz", GZIPPED[:40] + b"damage" + GZIPPED[46:], "cannot be read: "),
        ("plain.jsonl.gz", lines(ROWS).encode(), "Not a gzipped file"),
        ("broken.jsonl", (lines(ROWS) + '{"prompt_ids": [1,\n').encode(), "JSON parse error: .* in row 12"),
        ("text.jsonl", b"Once upon a time\n", "JSON parse error"),
        ("latin.jsonl", '{"prompt": "caf\xe9"}'.encode("latin-1"), "cannot be read: "),
        ("wrong.parquet", b"no Parquet at all", "Parquet magic bytes not found"),
        ("empty.jsonl", b"", "got an empty file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message, streaming):
    path = tmp_path / name
    path.write_bytes(content)
    more = ("--streaming",) if streaming else ()
    error = refused(tmp_path, tmp_path / "no-target", path, *more)
    assert str(path) in error
    assert re.search(message, error)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "hello"}], r"expected a dataset with `messages`, or .*, got the columns \['text'\]; rename yours"),
        ([{"prompt_ids": "hello", "response_ids": "you"}], "expected a list of integers .* got 'hello'; tokenize"),
        ([{"messages": []}, {"messages": []}], "got none in 2 rows; check that the chat template"),
        ([{"messages": "hello"}], "expected messages with `role` and `content`, got 'h'"),
        ([{"prompt_ids": [1], "response_ids": [2, 500]}], "token ids below 97, .* got 500; tokenize"),
    ],
)
def test_dialogues_that_cannot_be_trained_on(tmp_path, target, dialogues, rows, message):
    dialogues.write_text(lines(rows))
    assert re.search(message, refused(tmp_path, target, dialogues, "--features_dir", tmp_path / "features"))


def test_target_without_a_chat_template(tmp_path, target, dialogues):
    make_tokenizer(None).save_pretrained(target)
    (target / "chat_template.jinja").unlink()
    dialogues.write_text(lines([{"messages": CHAT}]))
    assert "expected a tokenizer with a chat template, got one without" in refused(tmp_path, target, dialogues)


def test_target_whose_features_are_not_finite(tmp_path, target, dialogues):
    broken = make_target()
    with torch.no_grad():
        broken.model.norm.weight[3] = torch.nan
    broken.save_pretrained(target)
    error = refused(tmp_path, target, dialogues, "--features_dir", tmp_path / "features")
    assert (
        "expected finite features from LlamaForCausalLM in float32, got NaN or infinity at 6 tokens of the row"
        in error
    )
    assert not (tmp_path / "features").exists(), "one batch is tried first"


def test_features_of_packed_rows_onto_disk(tmp_path, target, dialogues, monkeypatch):
    more = ("--packing", "--max_length", 24, "--num_draft_steps", 2, "--max_steps", 2, "--eval_file", dialogues)
    more += ("--draft_vocab_size", 40, "--features_dir", tmp_path / "features", "--logging_steps", 1)
    more += ("--num_eval_prompts", 0)  # decoding would need the target
    with monkeypatch.context() as patch:
        trainer = make_trainer(arguments(tmp_path, target, dialogues, *more))
        trainer.compute_features()
        assert trainer.train_dataset[0]["features"].shape == (24, 32)
        assert trainer.train_dataset[0]["position_ids"] == [*range(8)] * 3
        assert {path.name for path in (tmp_path / "features").iterdir()} == {"train", "eval"}
        patch.setattr(features_module, "compute_features", None)
        again = make_trainer(arguments(tmp_path, target, dialogues, *more))
        again.compute_features()
    monkeypatch.setattr(again.target, "forward", None)
    again.train()
    assert again.evaluate()["eval_loss"] > 0
    error = refused(tmp_path, target, dialogues, "--features_dir", tmp_path / "features", "--max_length", 6)
    assert re.search(
        r"expected the features of this target and dataset in .*train, got .*rows 4, now 12; tokens", error
    )
    # Without features on disk the same is trained.
    other = make_trainer(arguments(tmp_path, target, dialogues, *more[:5], "--feature_noise", 0, "--max_steps", 2))
    batch = other.data_collator([other.train_dataset[0]])
    stored = again.data_collator([again.train_dataset[0]])
    torch.testing.assert_close(other.make_rows(batch, False).features, again.make_rows(stored, False).features)


def test_streams(tmp_path, target, dialogues):
    more = ("--streaming", "--max_steps", 4, "--draft_vocab_size", 40)
    result = CliRunner().invoke(app, ["train", *arguments(tmp_path, target, dialogues, *more)])
    assert result.exit_code == 0, result.output
    assert FSPADModel.from_pretrained(tmp_path / "head").config.draft_vocab_size == 40
    assert "expected max_steps with a stream" in refused(tmp_path, target, dialogues, *more, "--max_steps", 0)
    for options, message in (
        (("--packing",), "with `packing=True`, got a stream"),
        (("--features_dir", "a"), "expected all dialogues at once for features_dir, got a stream"),
    ):
        assert message in refused(tmp_path, target, dialogues, *more, *options)


def test_streams_are_shuffled(dialogues):
    options = DataArguments(train_file=[str(dialogues)], streaming=True)
    orders = [[row["prompt_ids"][2] for row in load_parts(options, seed)[0]] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == list(range(12)) != orders[0]


def test_training_goes_on_after_a_kill(tmp_path, target, dialogues):
    head = tmp_path / "head"
    more = ("--save_strategy", "steps", "--save_steps", 2, "--save_total_limit", 2, "--logging_steps", 1)
    more += ("--num_draft_steps", 2, "--features_dir", tmp_path / "features")
    command = ["train", *arguments(tmp_path, target, dialogues, "--max_steps", 10_000, *more)]
    process = fresh.start("from fspad.cli import app; app()", tmp_path, tmp_path / "log", *command)
    try:
        until = time.monotonic() + 300
        while not list(head.glob("checkpoint-*/trainer_state.json")):
            assert process.is_alive(), (tmp_path / "log.err").read_text()
            assert time.monotonic() < until, (tmp_path / "log.err").read_text()
            time.sleep(0.05)
    finally:
        process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    # What a kill in the middle of saving leaves
    half = head / "checkpoint-9998"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    (half / "trainer_state.json").write_text('{"global_step": 9998, ')
    last = Path(find_checkpoint(str(head), "true"))
    step = json.loads((last / "trainer_state.json").read_text())["global_step"]
    assert last.name == f"checkpoint-{step}"
    before = FSPADModel.from_pretrained(last).state_dict()

    more += ("--resume_from_checkpoint", "true", "--max_steps", step + 2)
    result = CliRunner().invoke(app, ["train", *arguments(tmp_path, target, dialogues, *more)])
    assert result.exit_code == 0, result.output
    state = json.loads((head / f"checkpoint-{step + 2}" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == list(range(1, step + 3))
    after = FSPADModel.from_pretrained(head).state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    moved = max((before[name] - after[name]).abs().max().item() for name in before)
    assert 0 < moved < 3 * 3e-4, "two steps of AdamW from the checkpoint, not from a new head"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("true", "expected a whole checkpoint in .*head, got none; leave out"),
        ("a", "expected the folder of a whole .* a;"),
    ],
)
def test_nothing_to_go_on_from(tmp_path, wanted, message):
    dialogues = tmp_path / "missing.jsonl"
    assert re.search(message, refused(tmp_path, "target", dialogues, "--resume_from_checkpoint", wanted))
