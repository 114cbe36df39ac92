"""Measurements: the sums over answers, and the tables."""

from dataclasses import replace

import pytest

from fspad.bench.measuring import Answer
from fspad.bench.records import FSPAD, PLAIN, AnswerRecord
from fspad.hub_cards import Measurement, summarize
from fspad.hub_cards.measurement import acceptance_table, results_table, shared_setup

SETUP = {"machine": "Some CPU, 2 cores", "dtype": "bfloat16", "threads": 2}


def records_of(question_id, accept_lengths, seconds, plain_seconds=None, is_identical=True, **fields):
    """The answer with the head to one prompt, and the plain one if its time is given."""
    token_ids = list(range(sum(accept_lengths) + 1))
    place = {"prompts": "Spec-Bench", "temperature": 0.0, "question_id": question_id, **fields}
    records = [AnswerRecord(method=FSPAD, answer=Answer(token_ids, seconds, accept_lengths), **place)]
    if plain_seconds is not None:
        plain = Answer(token_ids if is_identical else token_ids[::-1], plain_seconds)
        records.insert(0, AnswerRecord(method=PLAIN, answer=plain, **place))
    return records


MATH = records_of(1, [3, 1, 1, 4], 2.0, plain_seconds=4.0, task="math")
RAG = records_of(2, [1, 1, 2], 2.0, plain_seconds=2.0, is_identical=False, task="RAG")
RECORDS = [*MATH, *RAG]


def test_sums_over_answers():
    measurement = Measurement.from_records(RECORDS, **SETUP)
    assert measurement.tau == pytest.approx(13 / 7)
    assert measurement.acceptance_by_depth == pytest.approx([3 / 7, 2 / 7, 1 / 7])
    assert 1 + sum(measurement.acceptance_by_depth) == pytest.approx(measurement.tau)
    assert measurement.tokens_per_second == pytest.approx(15 / 4)
    assert measurement.speedup == pytest.approx(6 / 4)
    assert (measurement.num_prompts, measurement.num_plain_prompts, measurement.num_identical) == (2, 2, 1)
    assert (measurement.prompts, measurement.temperature, measurement.task) == ("Spec-Bench", 0.0, None)
    assert {name: getattr(measurement, name) for name in SETUP} == SETUP


def test_speedup_is_of_the_answers_that_have_both_times():
    measurement = Measurement.from_records([*MATH, *records_of(3, [2, 2], 50.0)])
    assert measurement.speedup == pytest.approx(2.0)
    assert measurement.tokens_per_second == pytest.approx(15 / 52)
    assert (measurement.num_prompts, measurement.num_plain_prompts, measurement.num_identical) == (2, 1, 1)
    assert any("2.00x (1 prompts)" in line for line in results_table([measurement]))
    tau, speedup = measurement.eval_results()
    assert (tau.metric_args, speedup.metric_args) == (None, {"num_prompts": 1})


def test_nothing_of_plain_generation_is_known_without_it():
    measurement = Measurement.from_records(records_of(1, [2, 2], 1.0))
    assert (measurement.speedup, measurement.num_plain_prompts, measurement.num_identical) == (None, None, None)
    assert [result.metric_type for result in measurement.eval_results()] == ["tau"]


def test_answers_without_a_step():
    measurement = Measurement.from_records(records_of(1, [], 1.0))
    assert (measurement.tau, measurement.acceptance_by_depth) == (1.0, [])


def test_other_methods_are_passed_over():
    other = [replace(record, method="prompt-lookup") for record in RECORDS if record.method == FSPAD]
    assert summarize([*RECORDS, *other]) == summarize(RECORDS)
    assert summarize(other) == []


def test_prompts_without_an_answer_with_the_head_are_passed_over():
    assert summarize([*MATH, RAG[0]]) == summarize(MATH)


def test_summary_has_whole_sets_before_their_tasks():
    sampled = [replace(r, temperature=1.0) for r in RECORDS]
    other = replace(MATH[1], prompts="Held-out prompts", task=None)
    measurements = summarize([*RECORDS, *sampled[:2], other, *sampled[2:]], **SETUP)
    assert [(m.prompts, m.temperature, m.task, m.num_prompts) for m in measurements] == [
        ("Spec-Bench", 0.0, None, 2),
        ("Spec-Bench", 0.0, "math", 1),
        ("Spec-Bench", 0.0, "RAG", 1),
        ("Spec-Bench", 1.0, None, 2),
        ("Spec-Bench", 1.0, "math", 1),
        ("Spec-Bench", 1.0, "RAG", 1),
        ("Held-out prompts", 0.0, None, 1),
    ]
    assert {m.dtype for m in measurements} == {"bfloat16"}
    # A set of one task is told once.
    assert [m.task for m in summarize(MATH)] == ["math"]


def test_answers_of_several_runs_are_not_put_together():
    with pytest.raises(ValueError, match=r"one set of prompts at one temperature, got \[\('A', 0.0\), \('B', 0.0\)\]"):
        Measurement.from_records([replace(MATH[1], prompts="A"), replace(MATH[1], prompts="B")])
    for records in ([], MATH[:1]):
        with pytest.raises(ValueError, match=r"with the head \(method 'fspad'\).* got \[\]"):
            Measurement.from_records(records)


def test_setup_is_told_once_if_it_is_the_same():
    measurements = summarize(RECORDS, **SETUP)
    assert shared_setup(measurements) == "machine Some CPU, 2 cores; dtype bfloat16; threads 2"
    assert results_table(measurements) == [
        "| Prompts | Task | Number | Temperature | tau | Speedup | Tokens/s | Same as plain |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| Spec-Bench |  | 2 | 0 (greedy) | 1.86 | 1.50x | 3.8 | 1 of 2 |",
        "| Spec-Bench | math | 1 | 0 (greedy) | 2.25 | 2.00x | 5.0 | 1 of 1 |",
        "| Spec-Bench | RAG | 1 | 0 (greedy) | 1.33 | 1.00x | 2.5 | 0 of 1 |",
    ]
    mixed = [measurements[0], replace(measurements[0], dtype="float32")]
    assert shared_setup(mixed) == "machine Some CPU, 2 cores; threads 2"
    assert results_table(mixed)[0].endswith("| Same as plain | Dtype |")
    assert shared_setup([replace(measurements[0], machine=None, dtype=None, threads=None)]) is None


def test_acceptance_by_depth():
    plain_tau = Measurement("Other prompts", 0, tau=2.0)
    assert acceptance_table([*summarize(RECORDS), plain_tau]) == [
        "| Prompts | Task | Temperature | 1 | 2 | 3 |",
        "| --- | --- | --- | --- | --- | --- |",
        "| Spec-Bench |  | 0 (greedy) | 42.9% | 28.6% | 14.3% |",
        "| Spec-Bench | math | 0 (greedy) | 50.0% | 50.0% | 25.0% |",
        "| Spec-Bench | RAG | 0 (greedy) | 33.3% |  |  |",
    ]
    assert acceptance_table([plain_tau]) == []


@pytest.mark.parametrize("shares", [[0.5, 0.6], [1.1], [0.5, -0.1], [float("nan")]])
def test_impossible_acceptance_is_refused(shares):
    with pytest.raises(ValueError, match="shares from 1 to 0 that never grow"):
        Measurement("Some", 0, tau=2.0, acceptance_by_depth=shares)


@pytest.mark.parametrize("values", [{"tau": 0.9}, {"tau": float("nan")}, {"speedup": -1.0}, {"temperature": -0.1}])
def test_impossible_measurements_are_refused(values):
    with pytest.raises(ValueError, match=f"expected {next(iter(values))} to be a finite number"):
        replace(Measurement("Some", 0, tau=2.0), **values)
