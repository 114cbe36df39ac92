"""Two processes train the head that one trains. All that they do is in `helpers/two_processes.py`, and done once."""

import json

import pytest
import torch

from fspad import FSPADModel
from helpers import fresh
from helpers.two_processes import TRAININGS, UNEVEN, train


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder that two processes wrote to, and the results of each."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in UNEVEN))
    script = "from helpers.two_processes import main; main()"
    logs, processes = [folder / f"log-{rank}" for rank in range(2)], []
    for rank, log in enumerate(logs):
        ranks = {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        processes.append(fresh.start(script, folder, log, environment=ranks))
    try:
        for process, log in zip(processes, logs, strict=True):
            process.join(550)
            assert process.exitcode == 0, log.with_suffix(".err").read_text()[-5000:]
    finally:
        for process in processes:
            process.kill()  # one waits for the other
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
