"""Training data without a dataset: the target answers prompts, and may write the prompts too."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from itertools import count as count_from
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from fspad.target_config import common_value

from .chat import PLACEHOLDER, check_chat_template, template_errors
from .completion import complete, find_end_ids
from .progress import show_progress
from .resumable import ResumableFile

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

_COLUMNS = ("index", "temperature", "messages", "prompt_ids", "response_ids")
# Prompts of so many batches are sorted by length, for less padding.
_WINDOW = 8
# After so many attempts in a row without a new prompt, a target is taken to have no more.
_MAX_FRUITLESS = 320


def synthesize(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    output_file: str | Path,
    temperatures: Sequence[float] = (0.0, 1.0),
    batch_size: int = 64,
    max_new_tokens: int = 512,
    seed: int = 0,
) -> int:
    """Let the target answer prompts, and append the dialogues to a file as they finish.

    An interrupted run goes on where it stopped, even if it was killed: rows whose `index` is in the file are skipped,
    and a line that was only half written is done again. The random numbers of an answer follow from `seed` and its
    index alone, so that this does not change what is sampled.

    Args:
        target: The target.
        tokenizer: Its tokenizer, with a chat template.
        prompts: Texts of the user. Their order gives the index, so append new prompts at the end.
        output_file: File to append to, `.jsonl` or `.parquet`, with the columns `index`, `temperature`, `messages`,
            `prompt_ids`, `response_ids`. Within a few batches, short prompts come first. A Parquet file appears when
            all are answered; until then, rows are in a `.parquet.jsonl` beside it.
        temperatures: Used in turn: prompt i gets `temperatures[i % len(temperatures)]`. 0 is greedy.
        batch_size: Prompts at once.
        max_new_tokens: Longest answer. An answer that does not end by then is kept. A prompt that leaves less room than
            this in the target's `max_position_embeddings` is left out, and the number of such prompts is logged.
        seed: Seed of the answers.

    Returns:
        How many dialogues were written.

    Raises:
        OSError: If the file cannot be written, e.g. to a full disk. It can be gone on with.
        ValueError: If target, tokenizer and settings do not go together, the file was begun with other prompts, another
            target or other settings, no prompt is short enough, or the target gives NaN or infinity.
    """
    check_settings(target, tokenizer, temperatures, max_new_tokens)
    _check_prompts(prompts, target, tokenizer)
    settings = _settings(target, temperatures, max_new_tokens, seed)
    file = ResumableFile(Path(output_file), settings)
    done = _read_done(file, prompts)
    end_ids = find_end_ids(target, tokenizer)
    longest = _longest_prompt(target, max_new_tokens)
    written = 0
    with show_progress("answers", len(prompts), len(done)) as advance:
        for batch in _batches(tokenizer, prompts, done, batch_size, longest):
            indices, prompt_ids = zip(*batch, strict=True)
            heat = [settings["temperatures"][index % len(temperatures)] for index in indices]
            seeds = [f"{seed} answer {index}" for index in indices]
            answers = complete(target, prompt_ids, heat, max_new_tokens, end_ids, seeds)
            texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
            messages = [[_user(prompts[index]), _assistant(text)] for index, text in zip(indices, texts, strict=True)]
            columns = (indices, heat, messages, prompt_ids, answers)
            file.append(dict(zip(_COLUMNS, row, strict=True)) for row in zip(*columns, strict=True))
            written += len(batch)
            advance(len(batch), sum(map(len, answers)))
    _report_too_long(len(prompts), len(done) + written, longest)
    file.finish()
    return written


def check_settings(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, temperatures: Sequence[float], max_new_tokens: int
) -> None:
    """Check that a target can answer with these settings.

    Args:
        target: The target.
        tokenizer: Its tokenizer.
        temperatures: Temperatures of the answers.
        max_new_tokens: Longest answer.

    Raises:
        ValueError: If the tokenizer has no chat template, or a setting is out of range.
    """
    check_temperatures(temperatures)
    check_chat_template(tokenizer, "or name a target that was trained on dialogues")
    if not 0 < max_new_tokens < (positions := _num_positions(target)):
        raise ValueError(
            f"expected `max_new_tokens` above 0 and below {positions}, the target's `max_position_embeddings`, which have to "
            f"hold a prompt too, got {max_new_tokens}; choose another length."
        )


def check_temperatures(temperatures: Sequence[float]) -> None:
    """Check temperatures to sample at.

    Args:
        temperatures: The temperatures.

    Raises:
        ValueError: If there is none, or one is negative or not finite.
    """
    wrong = [temperature for temperature in temperatures if not (math.isfinite(temperature) and temperature >= 0)]
    if wrong or not temperatures:
        raise ValueError(
            f"expected temperatures of 0 (greedy) or more, got {wrong[0] if wrong else 'none'}; 1 samples as the target "
            "was trained."
        )


def _settings(
    target: PreTrainedModel, temperatures: Sequence[float], max_new_tokens: int, seed: int
) -> dict[str, Any]:
    """What the rows of a file depend on."""
    name = target.config._name_or_path
    return {
        "target": str(Path(name).resolve()) if name and Path(name).is_dir() else name,
        "revision": getattr(target.config, "_commit_hash", None),
        "dtype": str(target.dtype).removeprefix("torch."),
        "temperatures": list(map(float, temperatures)),
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }


def _read_done(file: ResumableFile, prompts: Sequence[str]) -> set[int]:
    """Indices of the rows in a file, which must answer these prompts."""
    done: set[int] = set()
    for number, row in enumerate(file.read(), start=1):
        index = row.get("index")
        try:
            is_answer = index >= 0 and row["messages"][0]["content"] == prompts[index]
        except (LookupError, TypeError):
            is_answer = False
        if not is_answer:
            raise ValueError(
                f"expected answers to these prompts in {file.path}, got one to another prompt in line {number}: write to a "
                "new file, or go on with the prompts that it began with."
            )
        done.add(index)
    return done


def _longest_prompt(target: PreTrainedModel, max_new_tokens: int) -> float:
    """How many tokens a prompt may have."""
    return _num_positions(target) - max_new_tokens


def _num_positions(target: PreTrainedModel) -> float:
    positions = common_value(target.config.get_text_config(decoder=True), "max_position_embeddings")
    return positions if isinstance(positions, int) and positions > 0 else float("inf")


def _check_prompts(prompts: Sequence[str], target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the target can read all prompts, if its tokenizer has tokens that the target does not."""
    if max(tokenizer.get_vocab().values(), default=0) >= target.get_input_embeddings().weight.shape[0]:
        for index, prompt in enumerate(prompts):
            _check_ids(_prompt_ids(tokenizer, prompt), target, f"prompt {index} ({prompt[:80]!r})")


def _check_ids(ids: Sequence[int], target: PreTrainedModel, where: str) -> None:
    size = target.get_input_embeddings().weight.shape[0]
    if max(ids) >= size:
        raise ValueError(
            f"expected token ids below {size}, the number of the target's embeddings, got {max(ids)} in {where}; load the "
            "tokenizer that belongs to the target."
        )


def _batches(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    done: Collection[int],
    batch_size: int,
    longest: float,
) -> Iterator[list[tuple[int, list[int]]]]:
    """Indices and token ids of missing prompts, a batch at a time.

    Windows begin at fixed indices, so that a run which goes on makes the same batches as one that never stopped.
    """
    for start in range(0, len(prompts), _WINDOW * batch_size):
        indices = range(start, min(start + _WINDOW * batch_size, len(prompts)))
        window = [(index, _prompt_ids(tokenizer, prompts[index])) for index in indices if index not in done]
        window = sorted((row for row in window if len(row[1]) <= longest), key=lambda row: len(row[1]))
        for first in range(0, len(window), batch_size):
            yield window[first : first + batch_size]


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    messages = [_user(prompt)]
    with template_errors(messages):
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    if not encoded["input_ids"]:
        raise ValueError(
            f"expected a chat template that writes a prompt, got nothing for {prompt[:80]!r}: set another."
        )
    return list(encoded["input_ids"])


def _report_too_long(asked: int, answered: int, longest: float) -> None:
    if answered == asked:
        return
    limit = f"at most {longest} tokens, as the answer needs room within the target's `max_position_embeddings`"
    if answered == 0:
        raise ValueError(f"expected prompts of {limit}, got {asked} that are all longer; lower `max_new_tokens`.")
    logger.warning(f"Left out {asked - answered} of {asked} prompts: they must have {limit}.")


def write_prompts(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    output_file: str | Path,
    temperature: float = 1.0,
    batch_size: int = 64,
    max_new_tokens: int = 128,
    seed: int = 0,
) -> list[str]:
    """Let the target write the user's turns itself: it continues its chat template from where the user would write.

    An interrupted run goes on where it stopped, as that of [`synthesize`]. With a larger count, more are appended, the
    same ones that the larger count would have given at once.

    Args:
        target: The target; trained on its chat template, else it writes anything.
        tokenizer: Its tokenizer, with a chat template.
        count: How many distinct prompts there shall be in the file.
        output_file: File to append to, `.jsonl` or `.parquet`, with the columns `index` (of the attempt, as not every one
            gives a prompt), `temperature`, `prompt`.
        temperature: Sampling temperature.
        batch_size: Prompts at once.
        max_new_tokens: A prompt that does not end within this many tokens is not used.
        seed: Seed of the prompts.

    Returns:
        All prompts in the file, distinct and not empty: `count`, or more if there were more.

    Raises:
        OSError: If the file cannot be written, e.g. to a full disk. It can be gone on with.
        ValueError: If target, tokenizer and settings do not go together, the chat template does not show the user's text
            as it is, 320 attempts in a row give no new prompt, the file was begun with another target or other settings,
            or the target gives NaN or infinity.
    """
    check_settings(target, tokenizer, [temperature], max_new_tokens)
    opening, end_ids = _user_turn(target, tokenizer, max_new_tokens)
    file = ResumableFile(Path(output_file), _settings(target, [temperature], max_new_tokens, seed))
    prompts, next_attempt = _read_prompts(file)
    fruitless = 0
    with show_progress("prompts", max(count, len(prompts)), len(prompts)) as advance:
        # The batch that was not finished is done once more from its beginning, so that batches stay the same.
        batches = count_from(next_attempt - next_attempt % batch_size, batch_size)
        while len(prompts) < count and fruitless < _MAX_FRUITLESS:
            attempts = range(start := next(batches), start + batch_size)
            seeds = [f"{seed} prompt {attempt}" for attempt in attempts]
            written = complete(
                target, [opening] * batch_size, [temperature] * batch_size, max_new_tokens, end_ids, seeds
            )
            new: dict[str, int] = {}
            for attempt, ids in zip(attempts, written, strict=True):
                text = _finished_text(tokenizer, ids, end_ids)
                if attempt >= next_attempt and text and text not in prompts and len(prompts) + len(new) < count:
                    new.setdefault(text, attempt)
            file.append({"index": new[text], "temperature": temperature, "prompt": text} for text in new)
            prompts.update(dict.fromkeys(new))
            fruitless = 0 if new else fruitless + batch_size
            advance(len(new), sum(map(len, written)))
    if len(prompts) < count:
        raise ValueError(
            f"expected new prompts from {type(target).__name__}, got none in {fruitless} attempts after {len(prompts)}; "
            "it may not be trained on its chat template: pass prompts instead."
        )
    file.finish()
    return list(prompts)


def _read_prompts(file: ResumableFile) -> tuple[dict[str, None], int]:
    """The prompts in a file, and the number of the next attempt."""
    prompts, next_attempt = {}, 0
    for number, row in enumerate(file.read(), start=1):
        if not isinstance(row.get("prompt"), str) or not isinstance(row.get("index"), int):
            raise ValueError(
                f"expected prompts in {file.path}, got something else in line {number}: write to a new file."
            )
        prompts[row["prompt"]] = None
        next_attempt = row["index"] + 1
    return prompts, next_attempt


def _user_turn(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> tuple[list[int], list[int]]:
    """The token ids before what the user writes, and those that end it."""
    messages = [_user(PLACEHOLDER)]
    with template_errors(messages):
        before, found, after = tokenizer.apply_chat_template(messages, tokenize=False).partition(PLACEHOLDER)
    if not found or not before:
        raise ValueError(
            f"expected a chat template with text before the user's turn, got {before + found + after!r}; pass prompts "
            "instead."
        )
    opening = tokenizer(before, add_special_tokens=False)["input_ids"]
    _check_ids(opening, target, f"what the chat template writes before the user's turn ({before[:80]!r})")
    if len(opening) > (longest := _longest_prompt(target, max_new_tokens)):
        raise ValueError(
            f"expected a chat template with at most {longest} tokens before the user's turn, as {max_new_tokens} tokens of "
            f"the user need room within the target's `max_position_embeddings`, got {len(opening)}; pass prompts instead."
        )
    closing = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
    return opening, sorted({*find_end_ids(target, tokenizer), *closing})


def _finished_text(tokenizer: PreTrainedTokenizerBase, ids: list[int], end_ids: Collection[int]) -> str:
    """The text of a user's turn that was ended; nothing if there is a special token inside, which has left the turn."""
    if ids[-1] not in end_ids or set(ids[:-1]) & set(tokenizer.all_special_ids):
        return ""
    return tokenizer.decode(ids[:-1]).strip()
