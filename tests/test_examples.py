"""The programs in `examples/`, on tiny models."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from conftest import make_target
from test_data import make_tokenizer

from fspad import FSPADModel


@pytest.fixture
def train_smollm2(monkeypatch):
    path = Path(__file__).parents[1] / "examples" / "train_smollm2.py"
    spec = importlib.util.spec_from_file_location("train_smollm2", path)
    module = importlib.util.module_from_spec(spec)
    # For the dataclasses, whose annotations are looked up there
    monkeypatch.setitem(sys.modules, "train_smollm2", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "load_smollm2", lambda dtype: (make_target().to(dtype), make_tokenizer()))

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["train_smollm2.py", *map(str, arguments)])
        module.main()

    return run


def test_train_smollm2(tmp_path, monkeypatch, capsys, train_smollm2):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    questions = ["hello you", "hello", "you", "bye now", "hi you", "hi"]
    prompts, dialogues, held_out = (tmp_path / f"{name}.jsonl" for name in ("prompts", "dialogues", "held_out"))
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in questions))
    held_out.write_text(json.dumps({"prompt": "bye now"}) + "\n" + json.dumps({"prompt": "hello "}) + "\n")
    rows = [
        {
            "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "hi"}],
            "prompt_ids": [2, 5, number],
            "response_ids": [7, 8, 9, 1],
            "source": "here",
        }
        for number, text in enumerate(["hi", "hello"])
    ]
    dialogues.write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = tmp_path / "head"
    arguments = ["--output_dir", head, "--prompts", prompts, "--dialogs", dialogues, "--exclude", held_out]
    arguments += ["--max_new_tokens", 12, "--num_eval_dialogs", 1, "--draft_vocab_size", 40, "--cache_features"]
    arguments += ["--use_cpu", "--save_steps", 1, "--no_partial_alignment", "--eval_strategy", "no"]
    train_smollm2(*arguments, "--max_steps", 1)
    answered = [
        json.loads(line)["messages"][0]["content"] for line in (head / "dialogs.jsonl").read_text().splitlines()
    ]
    assert sorted(answered) == ["hello you", "hi you", "you"]
    # Of the given dialogues one is held out
    assert json.loads((head / "features" / "features.json").read_text())["rows"] == 4
    config = FSPADModel.from_pretrained(head).config
    assert (config.draft_vocab_size, config.draft_depth, config.num_draft_tokens) == (40, 4, 15)
    assert (config.feature_sampling, config.partial_alignment) == (True, False)
    assert "Draft vocabulary: 40 tokens, " in capsys.readouterr().out
    train_smollm2(*arguments, "--max_steps", 2, "--resume")
    assert (head / "checkpoint-2").is_dir()
    arguments = ["--output_dir", tmp_path / "more", "--head", head, "--dialogs", dialogues, "--num_eval_dialogs", 0]
    train_smollm2(*arguments, "--eval_strategy", "no", "--no_partial_alignment", "--use_cpu", "--max_steps", 1)
    assert FSPADModel.from_pretrained(tmp_path / "more").config.draft_vocab_size == 40
