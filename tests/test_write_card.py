"""The example that writes a card from what was recorded."""

import json
import runpy
import sys
from pathlib import Path

from huggingface_hub import ModelCard

import fspad
from fspad.bench.records import AnswerRecord
from fspad.hub_cards import summarize


def test_card_from_recorded_answers(tmp_path, monkeypatch, capsys):
    common = {"prompts": "Some prompts", "temperature": 0.0, "num_tokens": 4, "seconds": 2.0}
    common |= {"plain_num_tokens": 4, "plain_seconds": 3.0, "is_identical": True}
    records = [{**common, "accept_lengths": [2, 1], "task": task} for task in ("math", "RAG")]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    state = {"global_step": 20, "epoch": 1.9996, "log_history": [{"step": s, "eval_tau": s / 10} for s in (10, 20)]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    fspad.FSPADConfig(vocab_size=97, hidden_size=32, num_attention_heads=4).save_pretrained(tmp_path / "head")
    measured = {"machine": "Some CPU", "dtype": "bfloat16"}
    facts = {"target": "somebody/target", "license": "mit", "measured": measured, "training": {"hardware": "Some GPU"}}
    (tmp_path / "head" / "card.yaml").write_text(json.dumps(facts))  # YAML too
    example = Path(__file__).parent.parent / "examples" / "write_card.py"
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
    expected = summarize([AnswerRecord(**record) for record in records], **measured)
    assert card.data.eval_results == [result for measurement in expected for result in measurement.eval_results()]
