"""Training data without a dataset: the target answers prompts, and may write the prompts too."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import DynamicCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Not a text that a user would write, and the same after every template.
_PLACEHOLDER = "FSPAD-USER-TURN"


@torch.inference_mode()
def complete(
    target: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    max_new_tokens: int,
    end_ids: Sequence[int],
) -> list[list[int]]:
    """Continue a batch of prompts. Rows that have ended leave the batch, so that the rest gets faster.

    Args:
        target: The model that writes.
        prompts: Token ids of each prompt, at least one each.
        temperatures: For each prompt 0 for greedy decoding, or the temperature to sample at.
        max_new_tokens: Longest answer.
        end_ids: Tokens that end an answer.

    Returns:
        New token ids of each prompt, the end token included.
    """
    device = target.get_input_embeddings().weight.device
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    attention_mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    temperature = torch.tensor(temperatures, dtype=torch.float32, device=device)
    cache = DynamicCache(config=target.config)
    kwargs = {"logits_to_keep": 1} if target._supports_logits_to_keep() else {}
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        logits = target(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            **kwargs,
        ).logits[:, -1]
        tokens = _draw(logits.float(), temperature)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            answers[row].append(token)
        going = [i for i, row in enumerate(rows) if answers[row][-1] not in end_ids]
        if not going:
            break
        if len(going) < len(rows):
            kept = torch.tensor(going, device=device)
            cache.batch_select_indices(kept)
            rows = [rows[i] for i in going]
            tokens, temperature = tokens[kept], temperature[kept]
            attention_mask, position_ids = attention_mask[kept], position_ids[kept]
        input_ids = tokens[:, None]
        position_ids = position_ids[:, -1:] + 1
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(rows), 1)], dim=1)
    return answers


def _draw(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """One token a row: the most probable where the temperature is 0, else a sample."""
    tokens = logits.argmax(dim=-1)
    hot = temperature > 0
    if hot.any():
        probs = (logits[hot] / temperature[hot, None]).softmax(dim=-1)
        tokens[hot] = torch.multinomial(probs, 1)[:, 0]
    return tokens


def synthesize(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    output_file: str | Path,
    temperatures: Sequence[float] = (0.0, 1.0),
    batch_size: int = 32,
    max_new_tokens: int = 512,
) -> int:
    """Let the target answer prompts, and append the dialogues to a JSONL file as they finish.

    An interrupted run goes on where it stopped: rows whose `index` is in the file are skipped, and a line that was
    only half written is done again.

    Args:
        target: The target.
        tokenizer: Its tokenizer, with a chat template.
        prompts: Texts of the user. Their order gives the index, so append new prompts at the end.
        output_file: File to append to, with one object a line: `index`, `temperature`, `messages`, `prompt_ids`,
            `response_ids`.
        temperatures: Used in turn: prompt i gets `temperatures[i % len(temperatures)]`. 0 is greedy.
        batch_size: Prompts at once.
        max_new_tokens: Longest answer.

    Returns:
        How many dialogues were written.
    """
    output_file = Path(output_file)
    done = _read_done(output_file, prompts)
    missing = [index for index in range(len(prompts)) if index not in done]
    end_ids = _end_ids(target, tokenizer)
    columns = [TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    columns.append(TextColumn("{task.fields[speed]:.0f} tokens/s"))
    written_tokens = 0
    with output_file.open("a", encoding="utf-8") as file, Progress(*columns) as progress:
        task = progress.add_task("answers", total=len(prompts), completed=len(done), speed=0.0)
        for start in range(0, len(missing), batch_size):
            indices = missing[start : start + batch_size]
            chats = [[{"role": "user", "content": prompts[index]}] for index in indices]
            prompt_ids = [_prompt_ids(tokenizer, chat) for chat in chats]
            heat = [float(temperatures[index % len(temperatures)]) for index in indices]
            answers = complete(target, prompt_ids, heat, max_new_tokens, end_ids)
            for index, temperature, chat, ids, answer in zip(indices, heat, chats, prompt_ids, answers, strict=True):
                text = tokenizer.decode(answer, skip_special_tokens=True)
                row = {
                    "index": index,
                    "temperature": temperature,
                    "messages": [*chat, {"role": "assistant", "content": text}],
                    "prompt_ids": ids,
                    "response_ids": answer,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                written_tokens += len(answer)
            file.flush()
            elapsed = progress.tasks[task].elapsed or 1.0
            progress.update(task, advance=len(indices), speed=written_tokens / elapsed)
    return len(missing)


def _read_done(path: Path, prompts: Sequence[str]) -> set[int]:
    """Indices of the rows in a file, which must answer these prompts; what follows its last line break is cut off."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return set()
    done, end = set(), 0
    with path.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            row = json.loads(line)
            index = row.get("index")
            if index is None or index >= len(prompts) or row["messages"][0]["content"] != prompts[index]:
                raise ValueError(
                    f"expected answers to these prompts in {path}, got one to another prompt in line {len(done) + 1}: "
                    "write to a new file, or go on with the prompts that it began with."
                )
            done.add(index)
            end += len(line)
        file.truncate(end)
    return done


def _end_ids(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer, by the generation config (which knows of end-of-turn tokens), else the tokenizer."""
    ids = target.generation_config.eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]]) -> list[int]:
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])


def write_prompts(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    temperature: float = 1.0,
    batch_size: int = 32,
    max_new_tokens: int = 128,
) -> Iterator[str]:
    """Let the target write the user's turns itself: it continues its chat template from where the user would write.

    Args:
        target: The target; trained on its chat template, else it writes anything.
        tokenizer: Its tokenizer, with a chat template.
        count: How many distinct prompts.
        temperature: Sampling temperature.
        batch_size: Prompts at once.
        max_new_tokens: A prompt that does not end within this many tokens is not used.

    Yields:
        Distinct prompts that are not empty.

    Raises:
        ValueError: If the chat template does not show the user's text as it is.
        RuntimeError: If ten batches in a row have no new prompt.
    """
    yield from islice(_distinct_prompts(target, tokenizer, temperature, batch_size, max_new_tokens), count)


def _distinct_prompts(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    temperature: float,
    batch_size: int,
    max_new_tokens: int,
) -> Iterator[str]:
    chat = [{"role": "user", "content": _PLACEHOLDER}]
    before, found, after = tokenizer.apply_chat_template(chat, tokenize=False).partition(_PLACEHOLDER)
    if not found or not before:
        raise ValueError(
            f"expected a chat template with text before the user's turn, got {before + found + after!r}; pass prompts "
            "instead."
        )
    opening = tokenizer(before, add_special_tokens=False)["input_ids"]
    end_ids = {*_end_ids(target, tokenizer), *tokenizer(after, add_special_tokens=False)["input_ids"][:1]}
    seen: set[str] = set()
    fruitless = 0
    while fruitless < 10:
        new = set()
        for ids in complete(
            target, [opening] * batch_size, [temperature] * batch_size, max_new_tokens, sorted(end_ids)
        ):
            text = tokenizer.decode(ids[:-1]).strip()
            # A special token inside means that the target had left the user's turn.
            is_plain = not set(ids[:-1]) & set(tokenizer.all_special_ids)
            if ids[-1] in end_ids and is_plain and text and text not in seen:
                seen.add(text)
                new.add(text)
                yield text
        fruitless = 0 if new else fruitless + 1
    raise RuntimeError(
        f"expected new prompts from {type(target).__name__}, got none in ten batches after {len(seen)}; it may not be "
        "trained on its chat template: pass prompts instead."
    )
