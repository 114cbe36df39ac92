"""Questions from files, their choice, and their dialogues."""

import json

import pytest
import torch

from fspad.bench.questions import CONVERSATION, Question, choose_questions, encode_dialogue, read_questions
from helpers.dialogues import make_tokenizer


def write(path, lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_questions_of_spec_bench_and_prompts(tmp_path):
    path = write(
        tmp_path / "question.jsonl",
        [
            {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."], "reference": []},
            "\n",
            {"question_id": 161, "category": "rag", "turns": ["Say."]},
            {"prompt": "Tell."},
        ],
    )
    questions = read_questions(path)
    assert questions == [
        Question(81, ("Write.", "Again."), "writing"),
        Question(161, ("Say.",), "rag"),
        Question(4, ("Tell.",)),
    ]
    assert [question.task for question in questions] == [CONVERSATION, "rag", None]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        pytest.param("[" * 100_000, id="deeply nested"),
        {"text": "a"},
        {"prompt": 1},
        {"turns": ["a"]},
        {"question_id": 1, "turns": []},
        {"question_id": 1, "turns": [1]},
        {"question_id": [1], "turns": ["a"]},
    ],
)
def test_lines_that_are_no_question(tmp_path, line):
    path = write(tmp_path / "question.jsonl", [{"prompt": "a"}, line if isinstance(line, dict) else line + "\n"])
    with pytest.raises(ValueError, match=r'question\.jsonl:2: expected \{"question_id": 1, .*, got '):
        read_questions(path)


def test_files_without_questions_or_with_one_twice(tmp_path):
    with pytest.raises(ValueError, match="is empty"):
        read_questions(write(tmp_path / "a.jsonl", ["\n"]))
    with pytest.raises(ValueError, match="more than one 2: rename"):
        read_questions(write(tmp_path / "a.jsonl", [{"question_id": 2, "turns": ["a"]}, {"prompt": "b"}]))
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="expected JSON lines in UTF-8"):
        read_questions(tmp_path / "a.jsonl")


def test_the_first_of_every_task_and_of_its_categories_in_turn():
    categories = ["writing", "writing", "math", "qa", "math", "qa", "coding", None, "qa"]
    questions = [Question(number, ("a",), category) for number, category in enumerate(categories)]
    chosen = [[question.question_id for question in choose_questions(questions, number)] for number in (1, 2, 3, 4, 9)]
    assert chosen == [[0, 3, 7], [0, 2, 3, 5, 7], [0, 2, 3, 5, 6, 7, 8], [0, 1, 2, 3, 5, 6, 7, 8], list(range(9))]
    assert choose_questions(questions, None) == questions


def test_dialogue_is_a_chat():
    tokenizer = make_tokenizer()
    inputs = encode_dialogue(tokenizer, ["hello you", "bye"], ["hi"], torch.device("cpu"))
    text = "<user> hello you </s> end <assistant> hi </s> end <user> bye </s> end <assistant>"
    assert tokenizer.decode(inputs["input_ids"][0]) == text
    assert inputs["attention_mask"].shape == inputs["input_ids"].shape
    tokenizer.chat_template = None
    inputs = encode_dialogue(tokenizer, ["hello you", "bye"], ["hi"], torch.device("cpu"))
    assert tokenizer.decode(inputs["input_ids"][0]) == "hello you hi bye"
