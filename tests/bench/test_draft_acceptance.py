"""The metric for `evaluate`, loaded from its file."""

import json
import random
from pathlib import Path

import evaluate
import pytest
import torch

from fspad.bench import measuring
from fspad.bench.measuring import Answer, Comparison, acceptance_by_depth, mean_tokens_per_step
from helpers import fresh

PATH = Path(measuring.__file__).with_name("draft_acceptance.py")


@pytest.fixture
def metric(tmp_path):
    return evaluate.load(str(PATH), keep_in_memory=True, cache_dir=str(tmp_path))


def test_by_hand(metric):
    # Steps of 3, 1, 2 and 4 tokens: three accepted one draft, two a second one after it, one a third.
    results = metric.compute(predictions=[[3, 1, 2], [4]])
    assert results == {"tau": 2.5, "acceptance_by_depth": [0.75, 0.5, 0.25]}
    assert results["tau"] == 1 + sum(results["acceptance_by_depth"])


@pytest.mark.parametrize("predictions", [[], [[]], [[], []], [[0, 0]], [[1, 1, 1], [1]]])
def test_nothing_accepted(metric, predictions):
    assert metric.compute(predictions=predictions) == {"tau": 1.0, "acceptance_by_depth": []}


def test_padding_of_a_batch_is_no_step(metric):
    accept_lengths = torch.tensor([[3, 1, 2], [2, 0, 0]])
    assert metric.compute(predictions=accept_lengths) == metric.compute(predictions=[[3, 1, 2], [2]])


def test_answers_may_be_added_one_by_one(metric):
    metric.add(prediction=[3, 1])
    metric.add_batch(predictions=[[], [2]])
    assert metric.compute() == {"tau": 2.0, "acceptance_by_depth": [pytest.approx(2 / 3), pytest.approx(1 / 3)]}


def test_top_k_accuracy(metric):
    results = metric.compute(predictions=[[1]], ranks=torch.tensor([0, 4, 5, 0]), top_k=(1, 5, 8))
    assert results["accuracy_top_1"] == 0.5
    assert results["accuracy_top_5"] == 0.75
    assert results["accuracy_top_8"] == 1.0
    assert metric.compute(predictions=[[1]], ranks=[])["accuracy_top_1"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"predictions": [[2], [1, -1]]}, "accept lengths of at least 0, got -1"),
        ({"predictions": [[2]], "ranks": [0, -2]}, "ranks of at least 0, got -2"),
        ({"predictions": [[2]], "ranks": [0], "top_k": (1, 0)}, "top_k of at least 1, got 0"),
    ],
)
def test_impossible_numbers(metric, arguments, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(**arguments)


@pytest.mark.parametrize("seed", range(20))
def test_measurements_say_the_same(metric, seed):
    rng = random.Random(seed)
    accept_lengths = [rng.choices(range(1, 8), k=rng.randint(0, 9)) for _ in range(rng.randint(1, 4))]
    comparison = Comparison([], [Answer([1], 1.0, lengths) for lengths in accept_lengths])
    results = metric.compute(predictions=accept_lengths)
    assert results == {"tau": comparison.tau, "acceptance_by_depth": comparison.acceptance_by_depth}
    assert 1 + sum(comparison.acceptance_by_depth) == pytest.approx(comparison.tau)


def test_measurements_without_a_step_say_the_same(metric):
    results = metric.compute(predictions=[[]])
    assert results == {"tau": mean_tokens_per_step([]), "acceptance_by_depth": acceptance_by_depth([])}


SCRIPT = """
import json, multiprocessing, socket, sys
from concurrent.futures import ThreadPoolExecutor

def no_network(*args, **kwargs):
    raise AssertionError("the network was asked")

socket.socket.connect = socket.getaddrinfo = no_network
import evaluate

def load(experiment, index):
    arguments = {"keep_in_memory": True} if index % 2 else {"experiment_id": f"{experiment}-{index}"}
    return evaluate.load(sys.argv[1], **arguments)

def compute(metric, length):
    return metric.compute(predictions=[[length, length]] * 20)["tau"]

def taus(experiment):
    # Importing the module is not for several threads at once, computing is.
    metrics = [load(experiment, index) for index in range(8)]
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(compute, metrics, range(1, 9)))

with multiprocessing.get_context("fork").Pool(2) as pool:
    print(json.dumps({"taus": pool.map(taus, ["one", "other"]), "imports_fspad": "fspad" in sys.modules}))
"""


def test_offline_in_processes_and_threads_that_share_a_cache(tmp_path):
    environment = {"HF_HOME": str(tmp_path), "HF_EVALUATE_OFFLINE": "1"}
    output = fresh.run(SCRIPT, tmp_path, PATH, environment=environment)
    assert json.loads(output) == {"taus": [list(range(1, 9))] * 2, "imports_fspad": False}
