"""What a card tells of a training, from its log."""

import pytest

from fspad.hub_cards import Evaluation, Training, read_evaluations

LOG = [
    {"step": 5, "loss": 1.0, "accuracy": 0.1, "learning_rate": 1e-3},
    {"step": 10, "eval_accuracy": 0.5, "eval_accuracy_depth_2": 0.25, "eval_accuracy_top_8": 0.9, "eval_loss": 1.0},
    {"step": 10, "eval_tau": 1.5, "eval_speedup": 1.1, "eval_runtime": 3.0},
    {"step": 20, "eval_tau": 1.75, "eval_accuracy": 0.7},
    {"step": 20, "eval_tau": 2.0},
]


def test_evaluations_in_a_log():
    assert read_evaluations(LOG) == [
        Evaluation(10, None, tau=1.5, speedup=1.1, accuracies=(0.5, 0.25)),
        Evaluation(20, None, tau=2.0, speedup=None, accuracies=(0.7,)),
    ]
    named = [{"step": 10, "eval_my_set_tau": 1.5, "eval_my_set_accuracy": 0.5, "eval_my_set_accuracy_depth_2": 0.1}]
    assert read_evaluations(named) == [Evaluation(10, "my_set", tau=1.5, accuracies=(0.5, 0.1))]
    assert read_evaluations([{"step": 5, "train_runtime": 1.0}]) == []


def test_table_of_evaluations():
    assert Training(evaluations=read_evaluations(LOG)).evaluations_table() == [
        "| Optimizer steps | tau | Speedup | Accuracy, depth 1 | Depth 2 |",
        "| --- | --- | --- | --- | --- |",
        "| 10 | 1.50 | 1.10x | 50.0% | 25.0% |",
        "| 20 | 2.00 |  | 70.0% |  |",
    ]
    assert Training().evaluations_table() == []


@pytest.mark.parametrize(("number", "shown"), [(10, range(1, 11)), (11, range(1, 12, 2)), (31, range(3, 32, 4))])
def test_a_long_table_is_thinned_out(number, shown):
    rows = Training(evaluations=[Evaluation(step, tau=1.0) for step in range(1, number + 1)]).evaluations_table()
    assert [int(row.split("|")[1]) for row in rows[2:]] == list(shown)
