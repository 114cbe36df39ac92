"""The shipped head with the real SmolLM2-135M-Instruct, in fp32."""

import pytest
import torch
from transformers import AutoModel

from fspad.bench.measuring import mean_tokens_per_step
from fspad.bench.questions import encode_dialogue
from fspad.bench.smollm2 import find_smollm2, load_smollm2
from fspad.cli.loading import SHIPPED_HEAD

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
NEAR_TIE = 1e-4


@pytest.fixture(scope="module")
def loaded(request):
    target, tokenizer = load_smollm2(torch.float32)
    head = AutoModel.from_pretrained(request.config.rootpath / SHIPPED_HEAD, dtype=torch.float32)
    return target, tokenizer, head


def generate(target, inputs, head=None, **options):
    torch.manual_seed(0)
    return target.generate(**inputs, assistant_model=head, return_dict_in_generate=True, output_scores=True, **options)


def count_excused(plain, ours) -> int:
    """0 for identical tokens, 1 for a difference at a near-tie; anything else fails."""
    if torch.equal(plain.sequences, ours.sequences):
        return 0
    length = min(plain.sequences.shape[1], ours.sequences.shape[1])
    first = int((plain.sequences[0, :length] != ours.sequences[0, :length]).nonzero()[0])
    scores = plain.scores[first - plain.sequences.shape[1] + len(plain.scores)][0]
    gap = abs(float(scores[plain.sequences[0, first]] - scores[ours.sequences[0, first]]))
    assert gap < NEAR_TIE, f"token {first} differs, the scores are {gap:.1e} apart"
    return 1


@pytest.mark.parametrize(("num_draft_tokens", "least"), [(16, 1.8), ("auto", 1.0)])
def test_greedy_texts_are_identical_in_fewer_steps(loaded, monkeypatch, num_draft_tokens, least):
    target, tokenizer, head = loaded
    monkeypatch.setattr(head.config, "num_draft_tokens", num_draft_tokens)
    accept_lengths, excused = [], 0
    for prompt in PROMPTS:
        inputs = encode_dialogue(tokenizer, [prompt], [], target.device)
        plain = generate(target, inputs, do_sample=False, max_new_tokens=80)
        ours = generate(target, inputs, head, do_sample=False, max_new_tokens=80)
        excused += count_excused(plain, ours)
        accept_lengths += ours.accept_lengths.tolist()
    print(f"excused near-ties: {excused}")
    assert excused <= 1
    assert mean_tokens_per_step(accept_lengths) > least


@pytest.mark.parametrize("options", [{"temperature": 1.0, "top_k": 0}, {"temperature": 0.7, "top_p": 0.9}], ids=str)
def test_sampled_texts_are_identical(loaded, options):
    target, tokenizer, head = loaded
    excused = 0
    for prompt in PROMPTS:
        inputs = encode_dialogue(tokenizer, [prompt], [], target.device)
        plain = generate(target, inputs, do_sample=True, max_new_tokens=50, **options)
        ours = generate(target, inputs, head, do_sample=True, max_new_tokens=50, **options)
        excused += count_excused(plain, ours)
    print(f"excused near-ties: {excused}")
    assert excused <= 1


def test_options_together(loaded):
    target, tokenizer, head = loaded
    inputs = encode_dialogue(tokenizer, PROMPTS[:1], [], target.device)
    options = {
        "do_sample": False,
        "max_new_tokens": 60,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "stop_strings": [" Mars"],
        "tokenizer": tokenizer,
    }
    assert count_excused(generate(target, inputs, **options), generate(target, inputs, head, **options)) == 0


def test_the_demo(capsys):
    from typer.testing import CliRunner

    from fspad.cli import app

    result = CliRunner().invoke(app, ["demo", "--num-prompts", "1", "--max-new-tokens", "24"])
    assert result.exit_code == 0, result.output
    assert "identical" in result.output
