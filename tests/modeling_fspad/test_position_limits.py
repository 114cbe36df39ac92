"""Positions that end, or change their meaning, on the way: plain decoding passes them one by one, and so do drafts."""

import copy

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from fspad.position_limits import PositionLimits, position_table_length
from helpers.comparing import assert_same, check_accept_lengths, generate
from helpers.models import know_the_future, make_head, make_target
from helpers.other_targets import make_family

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
    "original_max_position_embeddings": 24,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


def compare(target, prompt, min_accepted=3, num_seeds=3, **options):
    """Plain decoding against drafts of a random head, and those that know the future, greedy and sampled."""
    for do_sample in (False, True):
        # Dynamic RoPE keeps the frequencies of the longest text so far, so every call gets a target of its own
        plain = generate(copy.deepcopy(target), prompt, seed=1, do_sample=do_sample, **options)
        lengths = []
        for seed in range(num_seeds):
            head = make_head(target)
            if seed:
                know_the_future(head, plain.sequences, seed)
            ours = generate(copy.deepcopy(target), prompt, head, seed=1, do_sample=do_sample, **options)
            assert_same(plain, ours, f"seed {seed} {options}")
            check_accept_lengths(ours, ours.sequences.shape[1] - prompt.shape[1])
            lengths += ours.accept_lengths.tolist()
        assert max(lengths) >= min_accepted, "nothing was accepted, so nothing was tested"


def make_prompt(length=10):
    return torch.randint(1, 8, (1, length))


class StopAfter(StoppingCriteria):
    """Stops where nobody can see it coming: drafts would reach beyond."""

    def __init__(self, num_new_tokens, prompt):
        self.length = prompt.shape[1] + num_new_tokens

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def compare_to_the_end(target, prompt, num_new_tokens, **options):
    criteria = StoppingCriteriaList([StopAfter(num_new_tokens, prompt)])
    plain = generate(target, prompt, max_new_tokens=100, do_sample=False, stopping_criteria=criteria, **options)
    assert plain.sequences.shape[1] == prompt.shape[1] + num_new_tokens
    longer = torch.cat([plain.sequences, make_prompt(9)], dim=1)
    for seed in range(1, 4):
        head = make_head(target)
        know_the_future(head, longer, seed)  # and more of it than there will be
        ours = generate(
            target, prompt, head, max_new_tokens=100, do_sample=False, stopping_criteria=criteria, **options
        )
        assert_same(plain, ours, f"seed {seed}")
        assert ours.accept_lengths.max() > 2
    compare(target, prompt, num_seeds=2, max_new_tokens=num_new_tokens, **options)


# The last token is never fed, so there may be one token more than there are positions
@pytest.mark.parametrize("num_new_tokens", [22, 23])
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("gpt2", {"n_positions": 32, "vocab_size": 9}),
        ("gptj", {"n_positions": 32}),
        ("codegen", {"n_positions": 32}),
        ("ctrl", {"n_positions": 32}),
        ("mpt", {"max_seq_len": 32}),
        ("biogpt", {"max_position_embeddings": 32}),
    ],
)
def test_positions_end_where_the_target_ends(family, sizes, num_new_tokens):
    """Positions in a table: no draft may look beyond its end, where plain decoding never looks."""
    make = make_target if family == "gpt2" else make_family
    compare_to_the_end(make(family, **sizes), make_prompt(), num_new_tokens)


@pytest.mark.parametrize("offset", [3, 9])
def test_a_table_and_the_users_own_positions(offset):
    target = make_target("gpt2", vocab_size=9, n_positions=32)
    compare_to_the_end(target, make_prompt(), 23 - offset, position_ids=torch.arange(10)[None] + offset)


def test_padding_takes_no_positions():
    target = make_target("gpt2", vocab_size=9, n_positions=24)
    prompt, mask = torch.ones(1, 30, dtype=torch.long), torch.tensor([[0] * 20 + [1] * 10])
    compare_to_the_end(target, prompt, 15, attention_mask=mask)


def test_prompts_longer_than_the_targets_positions_are_refused():
    target = make_target("gpt2", vocab_size=9, n_positions=24)
    with pytest.raises(ValueError, match="the prompt has 25 tokens, GPT2LMHeadModel has 24 positions"):
        target.generate(torch.ones(1, 25, dtype=torch.long), assistant_model=make_head(target), max_new_tokens=2)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope", "yarn", "llama3"])
def test_rope_scalings_of_the_target(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0}
    if rope_type != "dynamic":
        rope["original_max_position_embeddings"] = 24
    if rope_type == "longrope":
        rope = LONGROPE
    if rope_type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    target = make_target(vocab_size=9, rope_parameters=rope, max_position_embeddings=24)
    compare(target, make_prompt(), max_new_tokens=40)


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("offset", [5, 20])
def test_rope_scalings_and_the_users_own_positions(rope, offset):
    """Frequencies change with the positions, not with the number of tokens."""
    target = make_target(vocab_size=9, rope_parameters=rope, max_position_embeddings=24)
    min_accepted = 1 if rope is DYNAMIC and offset == 20 else 3
    positions = torch.arange(10)[None] + offset
    compare(target, make_prompt(), min_accepted, max_new_tokens=40, position_ids=positions)


@pytest.mark.parametrize("rope", [LONGROPE, None], ids=["longrope", "default"])
def test_phi3_drops_its_cache_on_the_way(rope):
    """It does at this number of tokens whatever its RoPE, and computes anew."""
    options = {} if rope is None else {"rope_parameters": rope}
    target = make_family("phi3", original_max_position_embeddings=24, **options)
    calls = []
    target.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    prompt = make_prompt()
    target.generate(prompt, max_new_tokens=40, do_sample=False)
    assert max(calls[1:]) > 20, "nothing was computed anew, so nothing was tested"
    compare(target, prompt, max_new_tokens=40)
    # A prompt beyond it, and one that ends there
    for length in (23, 24, 25, 30):
        compare(target, make_prompt(length), num_seeds=2, max_new_tokens=12)


def limits_at(target, position):
    limits = PositionLimits(target)
    limits.start({"position_ids": torch.tensor([[position]])})
    return limits


def test_limits():
    plain = make_target()
    assert position_table_length(plain) is None
    assert limits_at(plain, 600).max_depth(600, 599) is None
    gpt2 = make_target("gpt2", n_positions=24)
    assert position_table_length(gpt2) == 24
    limits = limits_at(gpt2, 20)
    assert limits.max_depth(99, 98) == 3
    limits.advance(2)
    assert limits.max_depth(99, 98) == 1
    limits.advance(4)
    assert limits.max_depth(99, 98) == 0
    longrope = make_target(rope_parameters=LONGROPE)
    assert [limits_at(longrope, position).max_depth(0, 0) for position in (22, 23, 24)] == [1, 0, None]
    dynamic = make_target(rope_parameters=DYNAMIC, max_position_embeddings=24)
    assert [limits_at(dynamic, position).max_depth(0, 0) for position in (22, 23, 24)] == [1, 0, 0]


def test_the_first_position_follows_from_what_there_is():
    limits = PositionLimits(make_target())
    limits.start({"attention_mask": torch.tensor([[0, 0, 1, 1, 1]])})
    assert limits.position == 2
