"""Measured answers as JSON lines: what model cards and reports are made from, and what a run goes on from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .measuring import Answer

PLAIN = "plain"
FSPAD = "fspad"


@dataclass(frozen=True)
class AnswerRecord:
    """One answer to one prompt by one method.

    Args:
        prompts: Name of the set that the prompt is from.
        question_id: Which prompt of the set it is.
        temperature: 0 for greedy decoding.
        method: How it was generated; `PLAIN` for `generate` without any assistance, `FSPAD` for a head as it is.
        answer: The answer and what it took.
        turn: Which user's message of a dialogue it answers, from 1 on.
        task: Which part of the set the prompt is from.
    """

    prompts: str
    question_id: int | str
    temperature: float
    method: str
    answer: Answer
    turn: int = 1
    task: str | None = None

    @property
    def place(self) -> tuple[str, int | str, int, float]:
        """What answers by different methods have in common, if they can be compared."""
        return self.prompts, self.question_id, self.turn, self.temperature

    def to_dict(self) -> dict[str, Any]:
        """Everything that is known, in one level, as JSON can hold it."""
        values = {name: value for name, value in vars(self).items() if name != "answer"}
        return {name: value for name, value in {**values, **vars(self.answer)}.items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AnswerRecord:
        """The record that was written as `to_dict` gives it.

        Args:
            values: Its fields and those of its answer.

        Raises:
            TypeError: If fields are missing or unknown.
            ValueError: If a value is impossible.
        """
        of_answer = {field.name for field in dataclasses.fields(Answer)}
        answer = Answer(**{name: value for name, value in values.items() if name in of_answer})
        return cls(answer=answer, **{name: value for name, value in values.items() if name not in of_answer})


def pair_with_plain(records: Iterable[AnswerRecord], method: str) -> list[tuple[AnswerRecord, AnswerRecord | None]]:
    """Find what plain generation took for the prompts that a method answered.

    Args:
        records: Answers by any methods.
        method: One of them.

    Returns:
        The method's answers in their order, each with the plain one or `None`.
    """
    records = list(records)
    plain = {record.place: record for record in records if record.method == PLAIN}
    return [(record, plain.get(record.place)) for record in records if record.method == method]


def begin_records(path: Path, setup: Mapping[str, Any]) -> list[AnswerRecord]:
    """Begin a file of records, or go on with one, of which a line that was only half written is cut off.

    Args:
        path: The file; its folder is made.
        setup: What the figures depend on, as JSON can hold it; the first line of the file.

    Returns:
        The records that there are.

    Raises:
        ValueError: If the file was begun with another setup, or has other lines than records.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_bytes() if path.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]
    if not whole.strip():
        path.write_text(_to_line({"setup": dict(setup)}), encoding="utf-8")
        return []
    if len(whole) < len(text):
        with path.open("rb+") as file:
            file.truncate(len(whole))
    before, now = read_setup(path), json.loads(json.dumps(setup))
    if before != now:
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        differences = "; ".join(f"{name} {before.get(name)!r}, now {now.get(name)!r}" for name in names)
        raise ValueError(
            f"expected the setup that {path} was begun with, got another one ({differences}): figures of both cannot be "
            "compared. Go on with the former, or write to a new file."
        )
    return read_records(path)


def append_record(path: Path, record: AnswerRecord) -> None:
    """Append a record to a file.

    Args:
        path: The file.
        record: What to append.
    """
    with path.open("a", encoding="utf-8") as file:
        file.write(_to_line(record.to_dict()))


def read_records(path: str | Path) -> list[AnswerRecord]:
    """Read a JSON-lines file of measured answers.

    Args:
        path: File with one object a line, whose keys are the fields of an [`AnswerRecord`] and of its [`Answer`].

    Returns:
        The records. There are none in a file that holds nothing but its setup.

    Raises:
        ValueError: If a line is no such object, or there is no line.
    """
    lines = _numbered_lines(path)
    records = []
    for number, line in lines:
        try:
            values = json.loads(line)
            if number == lines[0][0] and "setup" in values:
                continue
            records.append(AnswerRecord.from_dict(values))
        except (AttributeError, TypeError, ValueError) as error:
            fields = [*dataclasses.fields(AnswerRecord), *dataclasses.fields(Answer)]
            names = ", ".join(field.name for field in fields if field.name != "answer")
            raise ValueError(
                f"{path}:{number}: expected a measured answer, an object with some of {names}; {error}"
            ) from error
    return records


def read_setup(path: str | Path) -> dict[str, Any]:
    """Read what the figures in a file of measured answers depend on.

    Args:
        path: The file.

    Returns:
        The setup, which has `machine`, `dtype`, `threads` and more; empty if the file does not tell.

    Raises:
        ValueError: If there is no line, or the first is no JSON object.
    """
    number, line = _numbered_lines(path)[0]
    try:
        return json.loads(line).get("setup", {})
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{path}:{number}: expected an object with what was measured, got {line[:80]!r}") from error


def _numbered_lines(path: str | Path) -> list[tuple[int, str]]:
    lines = enumerate(Path(path).read_text(encoding="utf-8").split("\n"), start=1)
    numbered = [(number, line) for number, line in lines if line.strip()]
    if not numbered:
        raise ValueError(f"{path} is empty: expected a measured answer a line")
    return numbered


def _to_line(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"
