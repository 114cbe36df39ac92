"""Runs: the order of the methods, the dialogues, and going on after an interruption."""

import logging

import pytest

from fspad.bench import running
from fspad.bench.measuring import Answer
from fspad.bench.methods import make_methods
from fspad.bench.questions import Question
from fspad.bench.running import Benchmark
from helpers.dialogues import make_tokenizer
from helpers.models import make_head, make_target

QUESTIONS = [Question("a", ("hello you", "bye"), "writing"), Question("b", ("hi",), "qa"), Question("c", ("now",))]


class Method:
    """A method that writes down when it was asked what."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def answer(self, target, inputs, max_new_tokens, temperature):
        self.log.append((self.name, inputs["input_ids"].shape[1], max_new_tokens, temperature))
        return Answer([7] if self.name == "plain" else [8, 9], 1.0)


@pytest.fixture
def make_benchmark():
    def make(log, names=("plain", "one", "two"), target=None, **options):
        values = {"temperatures": [0.0], "max_new_tokens": 20, **options}
        methods = [Method(name, log) for name in names]
        return Benchmark(target or make_target(), make_tokenizer(), methods, "some", QUESTIONS, **values)

    return make


def test_methods_take_turns_and_the_first_rotates(make_benchmark):
    log, records = [], []
    benchmark = make_benchmark(log)
    benchmark.run([], records.append)
    assert [entry[0] for entry in log[:3]] == ["plain", "one", "two"], "warm-up"
    assert {entry[2] for entry in log[:3]} == {8}
    order = ["plain", "one", "two", "one", "two", "plain", "two", "plain", "one", "plain", "one", "two"]
    assert [entry[0] for entry in log[3:]] == [record.method for record in records] == order
    assert len(records) == benchmark.num_answers == benchmark.num_done(records)
    places = [(record.question_id, record.turn, record.task) for record in records[::3]]
    assert places == [
        ("a", 1, "multi-turn conversation"),
        ("a", 2, "multi-turn conversation"),
        ("b", 1, "qa"),
        ("c", 1, None),
    ]
    assert {(record.prompts, record.temperature) for record in records} == {("some", 0.0)}


def test_later_turns_follow_on_the_plain_answer(make_benchmark):
    log = []
    make_benchmark(log, names=("one", "plain")).run([], lambda record: None)
    # <user> hello you </s> end <assistant>; hi </s> end <user> bye </s> end <assistant>
    assert [entry[1] for entry in log[2:6]] == [6, 6, 14, 14]


def test_only_first_turns(make_benchmark):
    records = []
    benchmark = make_benchmark([], all_turns=False)
    benchmark.run([], records.append)
    assert {record.turn for record in records} == {1}
    assert len(records) == benchmark.num_answers == 9


def test_every_temperature(make_benchmark):
    log, records = [], []
    make_benchmark(log, temperatures=[0.0, 1.0]).run([], records.append)
    assert [entry[3] for entry in log[3:]] == [record.temperature for record in records]
    assert len(records) == 24
    assert [record.temperature for record in records[:12]] == [0.0] * 6 + [1.0] * 6


@pytest.mark.parametrize("num_done", [0, 1, 4, 11, 12])
def test_an_interrupted_run_goes_on_where_it_stopped(make_benchmark, num_done):
    records, log, later = [], [], []
    make_benchmark([]).run([], records.append)
    benchmark = make_benchmark(log)
    done = records[:num_done]
    assert benchmark.num_done(done) == num_done
    benchmark.run(done, later.append)
    assert [*done, *later] == records
    assert len(log) == (len(later) + 3 if later else 0), "nothing is warmed up for nothing"


def test_records_of_other_questions_are_not_counted(make_benchmark):
    records = []
    make_benchmark([], temperatures=[0.0, 1.0]).run([], records.append)
    assert make_benchmark([]).num_done(records) == 12
    assert make_benchmark([], names=("plain",)).num_done(records) == 4


def test_dialogues_that_do_not_fit_are_left_out(make_benchmark, caplog, monkeypatch):
    records = []
    monkeypatch.setattr(running.logger, "propagate", True, raising=False)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    # Of 32 positions the first turns leave 20, the second of question a does not
    make_benchmark([], target=make_target("gpt2", n_positions=32)).run([], records.append)
    assert [(record.question_id, record.turn) for record in records[::3]] == [("a", 1), ("b", 1), ("c", 1)]
    assert "Left out: question 'a' from turn 2 on, whose 14 tokens and 20 new ones" in caplog.text


def test_with_real_methods_all_answers_are_the_plain_ones():
    target = make_target(vocab_size=97)
    head = make_head(target)
    tokenizer, records = make_tokenizer(), []
    benchmark = Benchmark(target, tokenizer, make_methods(head, target), "some", QUESTIONS, [0.0, 1.0], 6)
    benchmark.run([], records.append)
    plain = {record.place: record.answer.token_ids for record in records if record.method == "plain"}
    for record in records:
        if record.method != "prompt-lookup" or record.temperature == 0:
            assert record.answer.token_ids == plain[record.place]
