"""The shipped head with the real SmolLM2-135M-Instruct, in fp32."""

import pytest
import torch
from transformers import AutoModel

from fspad.bench.measuring import mean_tokens_per_step
from fspad.bench.questions import encode_dialogue
from fspad.bench.smollm2 import find_smollm2
from fspad.cli.loading import SHIPPED_HEAD
from helpers.commands import run
from helpers.comparing import assert_same, generate

pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif(
        find_smollm2() is None,
        reason="SmolLM2 is not here: `python -c 'from fspad.bench.smollm2 import fetch_smollm2; fetch_smollm2()'`",
    ),
]

PROMPTS = [
    "Name the planets of the solar system and one fact about each.",
    "Write a thank-you note to a friend who helped you move.",
    "If a pencil costs 3 coins and a notebook 8, what do 4 pencils and 2 notebooks cost?",
]


@pytest.fixture(scope="module")
def loaded(smollm2, request):
    target, tokenizer = smollm2
    head = AutoModel.from_pretrained(request.config.rootpath / SHIPPED_HEAD, dtype=torch.float32)
    return target, tokenizer, head


@pytest.fixture(scope="module")
def greedy(loaded):
    """Prompts, and how plain decoding goes on."""
    target, tokenizer, _ = loaded
    found = []
    for prompt in PROMPTS:
        inputs = encode_dialogue(tokenizer, [prompt], [], target.device)
        inputs["prompt"] = inputs.pop("input_ids")
        found.append((inputs, generate(target, **inputs, do_sample=False, max_new_tokens=40)))
    return found


@pytest.mark.parametrize(("num_draft_tokens", "least"), [(16, 1.8), ("auto", 1.0)])
def test_greedy_texts_are_identical_in_fewer_steps(loaded, greedy, monkeypatch, num_draft_tokens, least):
    target, _, head = loaded
    monkeypatch.setattr(head.config, "num_draft_tokens", num_draft_tokens)
    accept_lengths, excused = [], 0
    for inputs, plain in greedy:
        ours = generate(target, **inputs, head=head, do_sample=False, max_new_tokens=40)
        excused += not assert_same(plain, ours)
        accept_lengths += ours.accept_lengths.tolist()
    assert excused <= 1
    assert mean_tokens_per_step(accept_lengths) > least


@pytest.mark.parametrize("options", [{"temperature": 1.0, "top_k": 0}, {"temperature": 0.7, "top_p": 0.9}], ids=str)
def test_sampled_texts_are_identical(loaded, greedy, options):
    target, _, head = loaded
    excused = 0
    for inputs, _ in greedy:
        plain = generate(target, **inputs, do_sample=True, max_new_tokens=16, **options)
        ours = generate(target, **inputs, head=head, do_sample=True, max_new_tokens=16, **options)
        excused += not assert_same(plain, ours)
    assert excused <= 1


def test_options_together(loaded, greedy):
    target, tokenizer, head = loaded
    options = {
        "do_sample": False,
        "max_new_tokens": 40,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "stop_strings": [" Mars"],
        "tokenizer": tokenizer,
    }
    inputs, _ = greedy[0]
    assert torch.equal(
        generate(target, **inputs, **options).sequences, generate(target, **inputs, head=head, **options).sequences
    )


@pytest.mark.usefixtures("smollm2_is_loaded_once")
def test_the_demo():
    result = run("demo", "--num-prompts", 1, "--max-new-tokens", 12)
    assert result.exit_code == 0, result.output
    assert "identical" in result.output
