"""Targets that compute NaN or infinity."""

import pytest
import torch
from conftest import make_target
from test_synthesize import PROMPTS as TEXTS
from test_synthesize import make_pair

from fspad.trainer.completion import complete
from fspad.trainer.synthesize import synthesize

PROMPTS = [[5, 6], [7], [8, 9, 10]]


def spoil(target, value, row, step, tokens=slice(None)):
    """Let a target compute a value for some tokens after a row of a batch, from a step on."""
    steps = iter(range(99))

    def hook(module, args, outputs):
        if next(steps) >= step:
            outputs.logits[row, -1, tokens] = value

    target.register_forward_hook(hook)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("value", "tokens"),
    [(float("nan"), 3), (float("nan"), slice(None)), (float("inf"), 3), (-float("inf"), slice(None))],
)
@pytest.mark.parametrize("step", [0, 4])
def test_logits_that_are_not_finite_are_an_error(value, tokens, temperature, step):
    target = make_target()
    spoil(target, value, 1, step, tokens)
    message = r"finite logits from LlamaForCausalLM in float32, got NaN or infinity; check the target's weights"
    with pytest.raises(ValueError, match=message) as caught:
        complete(target, PROMPTS, [temperature] * 3, 6, [])
    assert "\n" not in str(caught.value)


def test_float16_overflows():
    target = make_target().half()
    with torch.no_grad():
        target.get_output_embeddings().weight.mul_(60000)
    with pytest.raises(ValueError, match=r"in float16, .* above 65504: load the target in bfloat16 or float32"):
        complete(target, PROMPTS, [0.0] * 3, 6, [])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_are_legitimate(temperature):
    target = make_target()
    spoil(target, -float("inf"), slice(None), 0, slice(5, 97))
    answers = complete(target, PROMPTS, [temperature] * 3, 6, [])
    assert {token for answer in answers for token in answer} <= set(range(5))


def test_rows_that_have_ended_may_be_anything():
    target = make_target()
    # Of nine rows one ends after its first token, and stays in the batch, as it is less than an eighth
    end = complete(target, [[5, 6]], [0.0], 1, [])[0][0]
    prompts = [[5, 6], *([token] for token in range(20, 28))]
    expected = complete(target, prompts, [0.0] * 9, 4, [end])
    assert [len(answer) for answer in expected] == [1] + [4] * 8
    spoil(target, float("nan"), 0, 1)
    assert complete(target, prompts, [0.0] * 9, 4, [end]) == expected


def test_answers_before_the_error_are_kept(tmp_path):
    target, tokenizer = make_pair()
    spoil(target, float("nan"), 0, 9)
    file = tmp_path / "dialogs.jsonl"
    with pytest.raises(ValueError, match="finite logits"):
        synthesize(target, tokenizer, TEXTS, file, batch_size=1, max_new_tokens=6)
    rows = file.read_text().splitlines()
    assert 0 < len(rows) < len(TEXTS)
    target._forward_hooks.clear()
    assert synthesize(target, tokenizer, TEXTS, file, batch_size=1, max_new_tokens=6) == len(TEXTS) - len(rows)
    assert file.read_text().splitlines()[: len(rows)] == rows
