"""The example that writes a card from what was recorded."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

import fspad
from fspad.bench.measuring import Answer
from fspad.bench.records import FSPAD, PLAIN, AnswerRecord, append_record, begin_records
from fspad.hub_cards import summarize

ROOT = Path(__file__).parents[2]


def test_card_from_recorded_answers(tmp_path, monkeypatch, capsys):
    records = [
        AnswerRecord("Some prompts", task, 0.0, method, answer, task=task)
        for task in ("math", "RAG")
        for method, answer in ((PLAIN, Answer([5, 6, 7, 8], 3.0)), (FSPAD, Answer([5, 6, 7, 8], 2.0, [2, 1])))
    ]
    begin_records(tmp_path / "results.jsonl", {"machine": "Some CPU", "dtype": "float32", "torch": "2.13"})
    for record in records:
        append_record(tmp_path / "results.jsonl", record)
    state = {"global_step": 20, "epoch": 1.9996, "log_history": [{"step": s, "eval_tau": s / 10} for s in (10, 20)]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    fspad.FSPADConfig(vocab_size=97, hidden_size=32, num_attention_heads=4).save_pretrained(tmp_path / "head")
    measured = {"dtype": "bfloat16"}
    facts = {"target": "somebody/target", "license": "mit", "measured": measured, "training": {"hardware": "Some GPU"}}
    (tmp_path / "head" / "card.yaml").write_text(json.dumps(facts))  # YAML too
    example = ROOT / "examples" / "write_card.py"
    options = ["--head", "head", "--results", "results.jsonl", "--trainer_state", "state.json"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(example), *options])
    runpy.run_path(str(example), run_name="__main__")
    assert Path(capsys.readouterr().out.strip()) == Path("head", "README.md")
    card = ModelCard.load(tmp_path / "head" / "README.md")
    assert "| Some prompts | math | 1 | 0 (greedy) | 1.50 | 1.50x | 2.0 | 1 of 1 |" in card.text
    assert "Measured with: machine Some CPU; dtype bfloat16." in card.text
    assert "- Optimizer steps: 20\n- Epochs: 2\n- Hardware: Some GPU\n" in card.text
    assert (card.data.license, card.data.base_model) == ("mit", "somebody/target")
    assert {path.name for path in Path("head").glob("*.png")} == {"acceptance_by_depth.png", "training.png"}
    expected = summarize(records, machine="Some CPU", **measured)
    assert card.data.eval_results == [result for measurement in expected for result in measurement.eval_results()]


def test_results_without_the_head_are_an_error(tmp_path):
    write_card = runpy.run_path(str(ROOT / "examples" / "write_card.py"))
    begin_records(tmp_path / "results.jsonl", {})
    append_record(tmp_path / "results.jsonl", AnswerRecord("Some prompts", 1, 0.0, PLAIN, Answer([5], 3.0)))
    with pytest.raises(ValueError, match=r"expected answers of the method 'fspad' in .*got none"):
        write_card["read_measurements"](tmp_path / "results.jsonl", {})


def test_committed_card_is_what_the_example_writes():
    head = ROOT / "examples" / "heads" / "smollm2-135m-instruct"
    write_card = runpy.run_path(str(ROOT / "examples" / "write_card.py"))
    facts = yaml.safe_load((head / "card.yaml").read_text(encoding="utf-8"))
    card = write_card["make_card"](head, facts, [head / "results.jsonl"], None)
    plots = sorted(path.name for path in head.glob("*.png"))
    assert str(card.render(plots)) == (head / "README.md").read_text(encoding="utf-8")
