"""Questions in the format of Spec-Bench, and the dialogues that they become."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# Spec-Bench counts these categories, which come from MT-bench, as one task of its six.
CONVERSATION = "multi-turn conversation"
_CATEGORIES_OF_CONVERSATION = frozenset(
    ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
)


@dataclass(frozen=True)
class Question:
    """What a user asks.

    Args:
        question_id: Its name within the file.
        turns: The user's messages, each but the first after an answer.
        category: Which kind it is of.
    """

    question_id: int | str
    turns: tuple[str, ...]
    category: str | None = None

    @property
    def task(self) -> str | None:
        """The category, or what Spec-Bench counts it as."""
        return CONVERSATION if self.category in _CATEGORIES_OF_CONVERSATION else self.category


def read_questions(path: Path) -> list[Question]:
    """Read questions from a JSON-lines file.

    Args:
        path: File with one object a line: `question_id`, `category` and `turns` as in Spec-Bench, or a `prompt` alone.

    Returns:
        The questions.

    Raises:
        ValueError: If a line is no such object, two have the same id, or there is no line.
    """
    questions = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected JSON lines in UTF-8 in {path}, got what cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            questions.append(_as_question(json.loads(line), number))
        except (KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(
                f'{path}:{number}: expected {{"question_id": 1, "category": "...", "turns": ["..."]}} or '
                f'{{"prompt": "..."}}, got {line[:80]!r}'
            ) from error
    if not questions:
        raise ValueError(
            f'{path} is empty: expected lines such as {{"prompt": "..."}} or {{"question_id": 1, "turns": ["..."]}}'
        )
    number_of = Counter(question.question_id for question in questions)
    if twice := [question_id for question_id, count in number_of.items() if count > 1]:
        raise ValueError(
            f"expected different question_ids in {path}, got more than one {twice[0]!r}: rename the others."
        )
    return questions


def _as_question(values: dict, number: int) -> Question:
    if "turns" not in values:
        question = Question(number, (values["prompt"],))
    else:
        question = Question(values["question_id"], tuple(values["turns"]), values.get("category"))
    is_text = all(isinstance(turn, str) for turn in question.turns)
    if not is_text or not question.turns or not isinstance(question.question_id, int | str):
        raise TypeError
    return question


def choose_questions(questions: Sequence[Question], per_task: int | None) -> list[Question]:
    """Choose the first questions of every task; of a task with several categories, one of each in turn.

    Args:
        questions: All questions.
        per_task: How many of each task at most; `None` for all.

    Returns:
        The chosen ones in their order. With a larger number, those of a smaller one are among them.
    """
    if per_task is None:
        return list(questions)
    seen_of_category: Counter[str | None] = Counter()
    order: dict[str | None, list[tuple[int, int]]] = {}
    for index, question in enumerate(questions):
        order.setdefault(question.task, []).append((seen_of_category[question.category], index))
        seen_of_category[question.category] += 1
    chosen = {index for ranked in order.values() for _, index in sorted(ranked)[:per_task]}
    return [question for index, question in enumerate(questions) if index in chosen]


def encode_dialogue(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[str], answers: Sequence[str], device: torch.device
) -> dict[str, torch.Tensor]:
    """Tokenize a dialogue that an answer is to follow, as a chat where the tokenizer has a template.

    Args:
        tokenizer: The target's tokenizer.
        turns: The user's messages.
        answers: What the assistant said to all but the last.
        device: Device of the target.

    Returns:
        `input_ids` and `attention_mask`, of shape `(1, length)`.
    """
    messages = [{"role": "user", "content": turns[0]}]
    for answer, turn in zip(answers, turns[1:], strict=True):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
    if not tokenizer.chat_template:
        encoded = tokenizer("\n\n".join(message["content"] for message in messages), return_tensors="pt")
    else:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    return {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}
