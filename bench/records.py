"""Measured answers as JSON lines: what a model card and any other report are made from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .measuring import Comparison


@dataclass(frozen=True)
class AnswerRecord:
    """One answer with the head, and what plain generation took for the same prompt if that was measured too.

    Args:
        prompts: Name of the set that the prompt is from.
        temperature: 0 for greedy decoding.
        accept_lengths: Tokens emitted by each verification step.
        num_tokens: New tokens.
        seconds: Wall time of the whole `generate` call.
        task: Which part of the set the prompt is from.
        draft_seconds: Part of the time that went into drafting.
        verify_seconds: Part of the time that went into verification.
        plain_num_tokens: New tokens of plain generation.
        plain_seconds: Wall time of plain generation.
        is_identical: Whether plain generation gave the same tokens.

    Raises:
        ValueError: If a step emitted nothing, a time is not positive, or plain generation has tokens without time.
    """

    prompts: str
    temperature: float
    accept_lengths: list[int]
    num_tokens: int
    seconds: float
    task: str | None = None
    draft_seconds: float | None = None
    verify_seconds: float | None = None
    plain_num_tokens: int | None = None
    plain_seconds: float | None = None
    is_identical: bool | None = None

    def __post_init__(self) -> None:
        if any(length < 1 for length in self.accept_lengths):
            raise ValueError(f"expected accept_lengths of at least 1, got {min(self.accept_lengths)}: measure again.")
        for name in ("seconds", "plain_seconds"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"expected {name} to be positive, got {value}: measure again.")
        if (self.plain_num_tokens is None) != (self.plain_seconds is None):
            raise ValueError(
                "expected plain_num_tokens and plain_seconds or neither of them, got "
                f"{self.plain_num_tokens} and {self.plain_seconds}: add the other."
            )


def records_of(
    comparison: Comparison, prompts: str, temperature: float, task: str | None = None
) -> list[AnswerRecord]:
    """What there is to record of a comparison.

    Args:
        comparison: Answers with the head, and the plain ones to the same prompts in the same order, or none.
        prompts: Name of the set of prompts.
        temperature: 0 for greedy decoding.
        task: Which part of the set the prompts are from.

    Returns:
        One record an answer.
    """
    records = []
    for index, answer in enumerate(comparison.assisted):
        record = AnswerRecord(
            prompts,
            temperature,
            answer.accept_lengths,
            len(answer.token_ids),
            answer.seconds,
            task,
            answer.draft_seconds,
            answer.verify_seconds,
        )
        if comparison.plain:
            plain = comparison.plain[index]
            record = dataclasses.replace(
                record,
                plain_num_tokens=len(plain.token_ids),
                plain_seconds=plain.seconds,
                is_identical=plain.token_ids == answer.token_ids,
            )
        records.append(record)
    return records


def write_records(path: str | Path, records: Iterable[AnswerRecord]) -> None:
    """Append records to a JSON-lines file; what is not known is left out.

    Args:
        path: The file.
        records: What to append.
    """
    with Path(path).open("a", encoding="utf-8") as file:
        for record in records:
            known = {name: value for name, value in dataclasses.asdict(record).items() if value is not None}
            file.write(json.dumps(known, ensure_ascii=False) + "\n")


def read_records(path: str | Path) -> list[AnswerRecord]:
    """Read a JSON-lines file of measured answers.

    Args:
        path: File with one object a line, whose keys are the fields of an [`AnswerRecord`].

    Returns:
        The records.

    Raises:
        ValueError: If a line is no such object, or there is no line.
    """
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(AnswerRecord(**json.loads(line)))
        except (TypeError, ValueError) as error:
            names = ", ".join(field.name for field in dataclasses.fields(AnswerRecord))
            raise ValueError(f"{path}:{number}: expected an object with some of {names}; {error}") from error
    if not records:
        raise ValueError(f"{path} is empty: expected a measured answer a line")
    return records
