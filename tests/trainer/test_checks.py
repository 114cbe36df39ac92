"""Checkpoints to go on from, whole and half written."""

import json

import pytest

from fspad.trainer.checks import find_checkpoint
from helpers.trainers import make_trainer


def test_checkpoints_are_told_by_their_steps(tmp_path):
    for step in (2, 10, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))

    def find(wanted):
        return find_checkpoint(str(tmp_path), wanted)

    assert find("true") == find(True) == str(tmp_path / "checkpoint-10")
    assert find(str(tmp_path / "checkpoint-2")) == str(tmp_path / "checkpoint-2")
    assert find(None) is find("false") is find(False) is None


def test_trainer_goes_on_from_the_last_whole_checkpoint(tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(ValueError, match=r"expected a whole checkpoint in .*, got none; leave out"):
        make_trainer(tmp_path, **arguments).train(resume_from_checkpoint=True)
    make_trainer(tmp_path, **arguments).train()
    # What a kill in the middle of saving leaves
    half = tmp_path / "checkpoint-9998"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"expected the folder of a whole checkpoint, got .*checkpoint-9998;"):
        make_trainer(tmp_path, **arguments).train(resume_from_checkpoint=str(half))
    resumed = make_trainer(tmp_path, max_steps=6, **arguments)
    resumed.train(resume_from_checkpoint=True)
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == resumed.state.global_step == 6
