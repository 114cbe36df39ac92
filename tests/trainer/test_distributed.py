"""Two processes train the head that one trains. All that they do is in `helpers/two_processes.py`, in a single launch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fspad import FSPADModel
from helpers.two_processes import TRAININGS, UNEVEN, train


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder that two processes wrote to, and the results of each."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in UNEVEN))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launched = subprocess.run(
        [*command, "-m", "helpers.two_processes", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert launched.returncode == 0, launched.stderr[-5000:]
    return folder, [json.loads((folder / f"results-{index}.json").read_text()) for index in range(2)]


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_train_what_one_trains(two_processes, tmp_path, name):
    folder, results = two_processes
    alone = train(name, tmp_path, num_processes=1)
    assert alone["num_processes"] == 1
    for result in (result[name] for result in results):
        assert result["num_processes"] == 2
        assert result["distributed_type"] == ("FSDP" if "sharded" in name else "MULTI_CPU")
        for one, other in zip(alone["losses"], result["losses"], strict=True):
            assert one == pytest.approx(other, abs=2e-6)
        # Seven dialogues for two processes: one is there twice, and must count once.
        assert alone["metrics"] == pytest.approx(result["metrics"], abs=2e-6)
    saved, expected = ({path.name: path for path in (root / name).iterdir()} for root in (folder, tmp_path))
    assert saved.keys() == expected.keys()
    assert saved["config.json"].read_text() == expected["config.json"].read_text()
    one, other = (FSPADModel.from_pretrained(root / name).state_dict() for root in (tmp_path, folder))
    assert one.keys() == other.keys()
    for weight, tensor in one.items():
        torch.testing.assert_close(tensor, other[weight], atol=1e-6, rtol=0)


def test_one_process_prepares_the_dataset(two_processes):
    _, (first, second) = two_processes
    assert first["written"] > 0
    assert second["written"] == 0


def test_what_several_processes_cannot_do(two_processes):
    for results in two_processes[1]:
        stream, checkpointing = results["refusals"]
        assert "streaming" in stream
        assert "gradient_checkpointing" in checkpointing
