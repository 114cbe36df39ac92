"""A benchmark run: all methods in turn on every question, each answer recorded as soon as it is there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers.utils import logging

from fspad.position_limits import position_table_length

from .measuring import WARM_UP_TOKENS
from .methods import Method
from .questions import Question, encode_dialogue
from .records import PLAIN, AnswerRecord

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Benchmark:
    """What is measured.

    Args:
        target: The model that answers.
        tokenizer: Its tokenizer.
        methods: How; plain generation among them.
        prompts: Name of the set of questions.
        questions: The questions.
        temperatures: 0 for greedy decoding.
        max_new_tokens: Length limit of an answer.
        all_turns: Whether all messages of a question are answered, or the first.
    """

    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    methods: Sequence[Method]
    prompts: str
    questions: Sequence[Question]
    temperatures: Sequence[float]
    max_new_tokens: int
    all_turns: bool = True

    @property
    def num_answers(self) -> int:
        """Answers of the whole run."""
        num_turns = sum(len(self._turns(question)) for question in self.questions)
        return num_turns * len(self.temperatures) * len(self.methods)

    def num_done(self, records: Iterable[AnswerRecord]) -> int:
        """How many of these answers there are.

        Args:
            records: What earlier runs recorded, maybe of other questions too.
        """
        ids = {question.question_id for question in self.questions}
        names = {method.name for method in self.methods}
        return sum(
            record.prompts == self.prompts
            and record.question_id in ids
            and record.temperature in self.temperatures
            and record.method in names
            for record in records
        )

    def run(self, done: Sequence[AnswerRecord], on_record: Callable[[AnswerRecord], None]) -> None:
        """Measure what is not measured yet, after a warm-up of all methods.

        Which method goes first rotates from prompt to prompt, so that a machine that gets slower or faster meanwhile
        favours none. The messages after the first follow on plain answers, so that all methods get the same prompts.

        Args:
            done: What earlier runs recorded.
            on_record: Called with every new record, at once.
        """
        known = {(record.place, record.method): record for record in done}
        is_warm = False
        num_prompts = 0
        for question, temperature in itertools.product(self.questions, self.temperatures):
            answers: list[str] = []
            for number, _ in enumerate(self._turns(question), start=1):
                inputs = encode_dialogue(self.tokenizer, question.turns[:number], answers, self.target.device)
                if not self._has_room(inputs, question, number):
                    break
                place = (self.prompts, question.question_id, number, temperature)
                missing = [method for method in self._rotated(num_prompts) if (place, method.name) not in known]
                num_prompts += 1
                if missing and not is_warm:
                    self._warm_up(inputs)
                    is_warm = True
                for method in missing:
                    answer = method.answer(self.target, inputs, self.max_new_tokens, temperature)
                    record = AnswerRecord(
                        self.prompts, question.question_id, temperature, method.name, answer, number, question.task
                    )
                    known[place, method.name] = record
                    on_record(record)
                plain = known[place, PLAIN].answer
                answers.append(self.tokenizer.decode(plain.token_ids, skip_special_tokens=True))

    def _turns(self, question: Question) -> tuple[str, ...]:
        return question.turns if self.all_turns else question.turns[:1]

    def _rotated(self, index: int) -> list[Method]:
        first = index % len(self.methods)
        return [*self.methods[first:], *self.methods[:first]]

    def _warm_up(self, inputs: dict[str, torch.Tensor]) -> None:
        for method in self.methods:
            method.answer(self.target, inputs, min(WARM_UP_TOKENS, self.max_new_tokens), self.temperatures[0])

    def _has_room(self, inputs: dict[str, torch.Tensor], question: Question, turn: int) -> bool:
        length, limit = inputs["input_ids"].shape[1], position_table_length(self.target)
        if limit is None or length + self.max_new_tokens <= limit:
            return True
        logger.warning(
            f"Left out: question {question.question_id!r} from turn {turn} on, whose {length} tokens and "
            f"{self.max_new_tokens} new ones do not fit into the target's {limit} positions."
        )
        return False
