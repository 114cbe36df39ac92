"""Records of a benchmark, made by hand."""

from fspad.bench.measuring import Answer
from fspad.bench.records import FSPAD, PLAIN, AnswerRecord

LOOKUP = "prompt-lookup"


def record(method, question_id, task, tokens, seconds, accept_lengths=(), times=(None, None, None), **place):
    """The record of an answer, by default at temperature 0."""
    answer = Answer([7] * tokens, seconds, list(accept_lengths), *times)
    return AnswerRecord("some", question_id, place.pop("temperature", 0.0), method, answer, task=task, **place)


# Question 1 has two turns: plain 20 tokens in 4 s, with the head 20 tokens in 2 s
RECORDS = [
    record(PLAIN, 1, "math", 10, 1.0, times=(None, 0.75, 0.1)),
    record(FSPAD, 1, "math", 10, 0.5, [5, 4], (0.1, 0.3, 0.1)),
    record(LOOKUP, 1, "math", 10, 1.25, [3, 3, 3], (None, 1.0, 0.1)),
    record(FSPAD, 1, "math", 10, 1.5, [9], (0.2, 0.9, 0.2), turn=2),
    record(PLAIN, 1, "math", 10, 3.0, times=(None, 2.5, 0.2), turn=2),
    record(LOOKUP, 1, "math", 10, 3.0, [3, 6], (None, 2.0, 0.2), turn=2),
    record(PLAIN, 2, "RAG", 5, 1.0, times=(None, 0.5, 0.5)),
    record(FSPAD, 2, "RAG", 4, 1.0, [1, 1, 1], (0.1, 0.3, 0.5)),
    record(PLAIN, 3, "RAG", 5, 1.0, times=(None, 0.5, 0.5)),
    record(FSPAD, 3, "RAG", 5, 0.25, [4], (0.0625, 0.125, 0.0625)),
    record(FSPAD, 4, "RAG", 50, 0.25, [49], (0.0625, 0.125, 0.0625)),  # not answered plainly yet
    record(PLAIN, 1, "math", 10, 2.0, temperature=1.0),
    record(FSPAD, 1, "math", 10, 1.0, [9], temperature=1.0),
]
