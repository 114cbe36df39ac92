"""The cases: how `generate` is called on a target, plain and with a head, and what must be equal."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel, StoppingCriteria
from transformers.models.auto import modeling_auto

from families.images import image_inputs
from families.inside import draft_the_truth, watching_mode
from families.tiny_models import FIRST_SPECIAL, MAX_POSITIONS, VOCAB_SIZE, WINDOW, TinyType, build
from helpers.models import make_head

NEAR_TIE = 1e-4
NOT_REPEATED = "plain decoding does not repeat itself"
NEW_TOKENS = 20
SECONDS = 90  # of one case, before it counts as hanging
DEVICE = os.environ.get("FSPAD_TEST_DEVICE", "cpu")  # of targets, heads and prompts


# --- The cases ---


@dataclass(frozen=True)
class Case:
    """A way to call `generate`.

    Args:
        name: Its name.
        options: Makes the options of `generate` for a target; the prompt is among them.
        attention: The attention implementation; `None` for the family's default, which mostly is sdpa.
        turns: Calls of `generate` in a row, each with the cache of the one before.
    """

    name: str
    options: Callable[[PreTrainedModel], dict[str, Any]]
    attention: str | None = None
    turns: int = 1


def prompt_of(length: int, padding: int = 0, seed: int = 5) -> dict[str, torch.Tensor]:
    """A random prompt, with padding on the left.

    Args:
        length: Tokens without padding.
        padding: Tokens of padding.
        seed: Seed of the tokens.
    """
    tokens = torch.randint(
        3, FIRST_SPECIAL, (1, length), generator=torch.Generator(torch.get_default_device()).manual_seed(seed)
    )
    mask = torch.ones_like(tokens)
    return {
        "input_ids": torch.cat([tokens.new_zeros(1, padding), tokens], dim=1),
        "attention_mask": torch.cat([mask.new_zeros(1, padding), mask], dim=1),
    }


def _greedy(length: int = 8, padding: int = 0, **options: Any) -> dict[str, Any]:
    return prompt_of(length, padding) | {"do_sample": False, "max_new_tokens": NEW_TOKENS} | options


class StopAt(StoppingCriteria):
    """Stops at a length that drafts know nothing of.

    Args:
        length: Number of tokens, the prompt included.
    """

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length, device=input_ids.device)


def _up_to_the_limit(target: PreTrainedModel) -> dict[str, Any]:
    """As many tokens as plain decoding writes, up to some beyond the largest position that the configuration names."""
    for total in (MAX_POSITIONS + 8, MAX_POSITIONS + 1, MAX_POSITIONS, MAX_POSITIONS - 1, MAX_POSITIONS - 2):
        options = _greedy(30, max_new_tokens=40, stopping_criteria=[StopAt(total)])
        try:
            run(target, options)
        except Exception:  # of whatever kind: past its positions each family fails in its own way
            continue
        return options
    return _greedy(30, max_new_tokens=2)


def _positions_up_to_the_limit(target: PreTrainedModel) -> dict[str, Any]:
    """Positions that reach the limit long before the cache does."""
    first = MAX_POSITIONS - NEW_TOKENS - 5
    criteria = [StopAt(6 + NEW_TOKENS)]
    return _greedy(6, position_ids=torch.arange(first, first + 6)[None], max_new_tokens=40, stopping_criteria=criteria)


OUTPUTS = {"output_attentions": True, "output_hidden_states": True, "output_logits": True}
CASES = {
    case.name: case
    for case in (
        Case("greedy", lambda target: _greedy()),
        Case("sampled", lambda target: _greedy(do_sample=True, temperature=0.8, top_k=20, repetition_penalty=1.2)),
        Case("eager", lambda target: _greedy(), attention="eager"),
        Case("padded", lambda target: _greedy(padding=3)),
        Case("padded, sampled, eager", lambda target: _greedy(padding=5, do_sample=True), attention="eager"),
        Case("second turn", lambda target: _greedy(max_new_tokens=9), turns=2),
        Case("second turn, padded", lambda target: _greedy(padding=2, max_new_tokens=9), turns=2),
        Case("outputs", lambda target: _greedy(**OUTPUTS), attention="eager"),
        Case("outputs, sdpa", lambda target: _greedy(**OUTPUTS)),
        Case("positions", lambda target: _greedy(position_ids=torch.arange(5, 13)[None])),
        Case("positions up to the limit", _positions_up_to_the_limit),
        Case("window", lambda target: _greedy(WINDOW + 6)),
        Case("window, padded, eager", lambda target: _greedy(WINDOW + 4, padding=4), attention="eager"),
        Case("limit", _up_to_the_limit),
        Case("from embeddings", lambda target: _from_embeddings(target)),
        Case("image", lambda target: _with_image(target)),
        Case("image, sampled", lambda target: _with_image(target, do_sample=True)),
    )
}
# What changes with the kind of RoPE
ROPE_CASES = ("greedy", "sampled", "padded", "second turn", "positions", "positions up to the limit", "limit")


def cases_of(tiny_type: TinyType) -> list[Case]:
    """The cases that say something about a type."""
    if tiny_type.rope is not None:
        return [CASES[name] for name in ROPE_CASES]
    sees = tiny_type.sees or tiny_type.name in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return [case for case in CASES.values() if sees or not case.name.startswith("image")]


def _from_embeddings(target: PreTrainedModel) -> dict[str, Any]:
    options = _greedy()
    with torch.no_grad():
        embeds = target.get_input_embeddings()(options.pop("input_ids"))
    return options | {"inputs_embeds": embeds}


def _with_image(target: PreTrainedModel, **options: Any) -> dict[str, Any]:
    inputs = image_inputs(target, prompt_of(6)["input_ids"])
    if inputs is None:
        raise ValueError("no known form of image is accepted")
    return _greedy() | inputs | options


# --- Running and comparing ---


@dataclass
class Result:
    """What a case came to.

    Args:
        type: The type, as written by `TinyType`.
        case: Name of the case.
        outcome: `identical`, `near tie`, `refused`, `different`, `crashed`, or `not applicable` where plain decoding
            fails too or nothing can be built.
        mode: `tree`, `chain` or `plain`; empty where nothing ran.
        reason: Why it is no tree, from the warning.
        accepted: The longest step.
        detail: What differs, or the error.
    """

    type: str
    case: str
    outcome: str
    mode: str = ""
    reason: str = ""
    accepted: int = 0
    detail: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As a row of JSON lines."""
        return asdict(self)


def run(target: PreTrainedModel, options: dict[str, Any], head: Any = None, seed: int | None = 3) -> Any:
    """Call `generate` with scores, from a seed.

    Args:
        target: The target.
        options: Options of `generate`, the prompt among them.
        head: The head, or `None` for plain decoding.
        seed: Seed of the sampling; `None` to draw on.
    """
    if seed is not None:
        torch.manual_seed(seed)
    special = list(range(FIRST_SPECIAL, VOCAB_SIZE))
    options = {"suppress_tokens": special, "return_dict_in_generate": True, "output_scores": True, **options}
    return target.generate(assistant_model=head, **options)


def check(tiny_type: TinyType, case: Case) -> Result:
    """Run a case plainly and with a head, and compare.

    A difference at a near tie is excused if it is gone in fp64, and said; no other is.

    Args:
        tiny_type: The type.
        case: The case.
    """
    result = _check(tiny_type, case, torch.float32)
    if result.outcome in ("different", "near tie"):
        again = _check(tiny_type, case, torch.float64)
        if again.outcome == "different":
            result.outcome, result.detail = "different", again.detail + " (fp64)"
        elif result.outcome == "different" and again.outcome == "identical":
            result.detail += " (equal in fp64)"
    return result


def _check(tiny_type: TinyType, case: Case, dtype: torch.dtype) -> Result:
    result = Result(str(tiny_type), case.name, "not applicable")
    try:
        with _time_limit(SECONDS):
            target = build(tiny_type).to(dtype)
            if case.attention is not None:
                target.set_attn_implementation(case.attention)
            options = tree_map_only(torch.Tensor, lambda tensor: tensor.to(DEVICE), case.options(target))
            target.to(DEVICE)
            plain = _turns(target, options, case.turns, None)
    except Exception as error:
        result.detail = _said(error)
        return result
    try:
        with _time_limit(SECONDS), watching_mode() as mode:
            head = make_head(target, draft_depth=1, draft_top_k=2)
            ours = _turns(target, options, case.turns, head, truth=plain)
    except Exception as error:
        is_clear = isinstance(error, ValueError) and "FSPAD head" in str(error)
        result.outcome, result.detail = "refused" if is_clear else "crashed", _said(error)
        return result
    if not all(hasattr(output, "accept_lengths") for output in ours):
        result.detail = "has a `generate` of its own, which asks no assistant"
        return result
    result.mode, result.reason = (*mode, "")[:2]
    result.accepted = max(int(output.accept_lengths.max()) for output in ours if output.accept_lengths.numel())
    result.outcome, result.detail = _compare_turns(plain, ours)
    if result.outcome != "identical":
        # States that a family keeps on the model may outlive a call
        again = _turns(target, options, case.turns, None)
        if _compare_turns(plain, again)[0] != "identical":
            result.outcome, result.detail = "not applicable", NOT_REPEATED
    return result


def _compare_turns(plain: list[Any], ours: list[Any]) -> tuple[str, str]:
    outcomes = (compare(plain_turn, our_turn) for plain_turn, our_turn in zip(plain, ours, strict=True))
    return next((outcome for outcome in outcomes if outcome[0] != "identical"), ("identical", ""))


def _turns(
    target: PreTrainedModel, options: dict[str, Any], turns: int, head: Any, truth: list[Any] | None = None
) -> list[Any]:
    outputs: list[Any] = []
    for turn in range(turns):
        if outputs:
            more = prompt_of(5, seed=turn)["input_ids"].to(DEVICE)
            options = dict(options)
            options["input_ids"] = torch.cat([outputs[-1].sequences, more], dim=1)
            grown = options["input_ids"].shape[1] - options["attention_mask"].shape[1]
            options["attention_mask"] = torch.nn.functional.pad(options["attention_mask"], (0, grown), value=1)
            options["past_key_values"] = outputs[-1].past_key_values
        if truth is None:
            outputs.append(run(target, options))
            continue
        padding = int((options["attention_mask"] == 0).sum())
        true_tokens = truth[turn].sequences[0]
        if "inputs_embeds" in options:  # sequences begin behind the prompt
            true_tokens = torch.cat([true_tokens.new_zeros(options["inputs_embeds"].shape[1]), true_tokens])
        draft_the_truth(head, true_tokens[padding:].tolist(), seed=turn)
        outputs.append(run(target, options, head))
    return outputs


def compare(plain: Any, ours: Any) -> tuple[str, str]:
    """Compare what `generate` returned.

    Args:
        plain: Output of plain decoding, with scores.
        ours: Output with a head.

    Returns:
        `identical`, `near tie` or `different`, and what differs.
    """
    theirs, own = plain.sequences[0].tolist(), ours.sequences[0].tolist()
    if theirs != own:
        start = len(theirs) - len(plain.scores)
        first = next((i for i, (a, b) in enumerate(zip(theirs, own, strict=False)) if a != b), None)
        if first is None:
            return "different", f"lengths {len(theirs)} and {len(own)}"
        scores = plain.scores[first - start][0]
        gap = abs(float(scores[theirs[first]] - scores[own[first]]))
        return "near tie" if gap < NEAR_TIE else "different", f"new token {first - start}, gap {gap:.1e}"
    for name in ("scores", "logits", "hidden_states", "attentions"):
        steps = getattr(plain, name, None), getattr(ours, name, None)
        if steps != (None, None) and (problem := _difference(*steps)):
            return "different", f"{name}{problem}"
    if (getattr(plain, "past_key_values", None) is None) != (ours.past_key_values is None):
        return "different", "past_key_values"
    return "identical", ""


def _difference(plain: Any, ours: Any, place: str = "") -> str:
    """Where two nested tuples of tensors differ; an empty string for nowhere."""
    if isinstance(plain, (tuple, list)) and isinstance(ours, (tuple, list)):
        if len(plain) != len(ours):
            return f"{place}: {len(plain)} and {len(ours)} entries"
        pairs = enumerate(zip(plain, ours, strict=True))
        return next(filter(None, (_difference(a, b, f"{place}[{i}]") for i, (a, b) in pairs)), "")
    if not isinstance(plain, torch.Tensor) or not isinstance(ours, torch.Tensor):
        return "" if plain is None and ours is None else f"{place}: {type(plain).__name__} and {type(ours).__name__}"
    if plain.shape != ours.shape:
        return f"{place}: shapes {tuple(plain.shape)} and {tuple(ours.shape)}"
    if torch.allclose(plain, ours, atol=1e-3, rtol=1e-3, equal_nan=True):
        return ""
    gap = (plain.nan_to_num(neginf=-1e9) - ours.nan_to_num(neginf=-1e9)).abs().max()
    return f"{place}: off by {float(gap):.1e}"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
