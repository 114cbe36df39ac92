"""What a report tells: the answers of each method put together, by temperature and task."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .measuring import Comparison
from .records import PLAIN, AnswerRecord, pair_with_plain


@dataclass(frozen=True)
class TimeSplit:
    """Where the time of an answer goes, in seconds per new token.

    Args:
        draft: Drafting; 0 where nothing tells it, and `other` has it.
        steps: Steps of the target after the prefill; verification, where there are drafts.
        other: The rest: prefill, choosing tokens where no step counts that, and bookkeeping.
    """

    draft: float
    steps: float
    other: float


@dataclass(frozen=True)
class Row:
    """All answers of a method to the questions of a task at one temperature.

    Args:
        temperature: 0 for greedy decoding.
        task: Which part of the questions; `None` for all.
        method: How the answers were generated.
        comparison: These answers and the plain ones to the same prompts.
        speedups: Of each question with all of its turns, tokens per second by those of plain generation.
    """

    temperature: float
    task: str | None
    method: str
    comparison: Comparison
    speedups: Sequence[float]

    @property
    def mean(self) -> float:
        """Mean speedup of the questions."""
        return statistics.mean(self.speedups)

    @property
    def median(self) -> float:
        """Median speedup of the questions."""
        return statistics.median(self.speedups)

    @property
    def least(self) -> float:
        """Speedup of the question that gains least."""
        return min(self.speedups)

    @property
    def split(self) -> TimeSplit | None:
        """Where the time goes; `None` if it is not known."""
        answers = self.comparison.assisted
        if any(answer.verify_seconds is None for answer in answers):
            return None
        tokens = sum(len(answer.token_ids) for answer in answers)
        draft = sum(answer.draft_seconds or 0.0 for answer in answers)
        steps = sum(answer.verify_seconds for answer in answers)
        other = sum(answer.seconds for answer in answers) - draft - steps
        return TimeSplit(draft / tokens, steps / tokens, other / tokens)


def summarize_methods(records: Sequence[AnswerRecord]) -> list[Row]:
    """Put the answers of each method together. What was not answered plainly too is left out.

    Args:
        records: Answers by any methods, plain ones among them.

    Returns:
        Of each temperature all questions before the tasks, and of each of these plain generation before other methods.

    Raises:
        ValueError: If there is no plain answer.
    """
    if all(record.method != PLAIN for record in records):
        raise ValueError("expected plain answers to compare with, got none: run the same benchmark again to go on.")
    methods = list(dict.fromkeys([PLAIN, *(record.method for record in records)]))
    tasks = list(dict.fromkeys(record.task for record in records))
    rows = []
    for temperature in sorted({record.temperature for record in records}):
        there = [record for record in records if record.temperature == temperature]
        for task in [None, *(task for task in tasks if task is not None and len(tasks) > 1)]:
            part = [record for record in there if task in (None, record.task)]
            rows += [row for method in methods if (row := _row(temperature, task, method, part)) is not None]
    return rows


def _row(temperature: float, task: str | None, method: str, records: Sequence[AnswerRecord]) -> Row | None:
    pairs = [(plain, record) for record, plain in pair_with_plain(records, method) if plain is not None]
    questions: dict[tuple[str, int | str], list[tuple[AnswerRecord, AnswerRecord]]] = {}
    for plain, record in pairs:
        questions.setdefault((record.prompts, record.question_id), []).append((plain, record))
    if not questions:
        return None
    speedups = [_compare(of_question).speedup for of_question in questions.values()]
    return Row(temperature, task, method, _compare(pairs), speedups)


def _compare(pairs: Sequence[tuple[AnswerRecord, AnswerRecord]]) -> Comparison:
    return Comparison([plain.answer for plain, _ in pairs], [record.answer for _, record in pairs])
