"""Batches of plain continuations."""

from itertools import pairwise

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicLayer

from fspad.trainer import completion
from fspad.trainer.completion import complete
from helpers.models import SIZES, make_target

LFM2 = transformers.Lfm2Config(
    **{
        **SIZES,
        "layer_types": ["conv", "full_attention", "conv"],
        "initializer_range": 0.5,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
)

# Keys and values of different widths, from a latent vector
DEEPSEEK = transformers.DeepseekV3Config(
    **{
        **SIZES,
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 6,
        "first_k_dense_replace": 3,
        "initializer_range": 0.5,
        "bos_token_id": None,
        "eos_token_id": None,
    }
)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", LFM2, DEEPSEEK])
def test_greedy_batch_is_generate_row_by_row(family, monkeypatch):
    monkeypatch.setattr(completion, "_ROOM", 4)
    if isinstance(family, str):
        target = make_target(family)
    else:
        target = transformers.AutoModelForCausalLM.from_config(family).eval()
        target.generation_config.pad_token_id = 0
    torch.manual_seed(2)
    prompts = [torch.randint(97, (length,)).tolist() for length in (3, 9, 1, 5, 7, 4)]
    plain = [target.generate(torch.tensor([p]), max_new_tokens=20, do_sample=False)[0, len(p) :] for p in prompts]
    # Two tokens that greedy decoding writes here and there, so that rows end at different steps.
    end_ids = [plain[0][4].item(), plain[3][9].item()]
    answers = complete(target, prompts, [0.0] * 6, 20, end_ids)
    expected = []
    for tokens in (row.tolist() for row in plain):
        stop = next((i + 1 for i, token in enumerate(tokens) if token in end_ids), 20)
        expected.append(tokens[:stop])
    assert answers == expected
    assert len({len(answer) for answer in answers}) > 1


def test_target_with_another_kind_of_cache_is_refused():
    config = transformers.MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, pad_token_id=None)
    config.bos_token_id = config.eos_token_id = None
    with pytest.raises(ValueError, match="got MambaForCausalLM"):
        complete(transformers.AutoModelForCausalLM.from_config(config).eval(), [[5, 6]], [0.0], 3, [])


def test_each_row_has_its_own_temperature():
    target = make_target()
    greedy = target.generate(torch.tensor([[5, 6]]), max_new_tokens=12, do_sample=False)[0, 2:].tolist()
    answers = complete(target, [[5, 6]] * 8, [0.0, 1.0] * 4, 12, [])
    assert all(answer == greedy for answer in answers[::2])
    assert len({tuple(answer) for answer in answers[1::2]}) == 4


def test_sampling_follows_the_targets_distribution():
    target = make_target(vocab_size=8)
    with torch.no_grad():
        probs = (target(torch.tensor([[1, 2, 3]])).logits[0, -1] / 0.7).softmax(-1)
    draws = torch.tensor(complete(target, [[1, 2, 3]] * 4000, [0.7] * 4000, 1, []))[:, 0]
    frequencies = torch.bincount(draws, minlength=8) / 4000
    assert (frequencies - probs).abs().max() < 0.03


def test_draws_follow_from_the_seed_whatever_the_batch():
    target = make_target()
    prompts, seeds = [[5, 6], [7], [8, 9, 10, 11]], ["a", "b", "c"]
    together = complete(target, prompts, [1.0] * 3, 15, [], seeds)
    torch.manual_seed(7)
    alone = [complete(target, [p], [1.0], 15, [], [seed])[0] for p, seed in zip(prompts, seeds, strict=True)]
    assert together == alone
    assert together != complete(target, prompts, [1.0] * 3, 15, [], ["d", "e", "f"])


def test_draws_do_not_depend_on_when_ended_rows_are_dropped(monkeypatch):
    target = make_target()
    torch.manual_seed(3)
    prompts = [torch.randint(97, (length,)).tolist() for length in range(1, 25)]
    seeds = [str(i) for i in range(24)]
    widths = []
    target.register_forward_pre_hook(lambda _, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True)
    together = complete(target, prompts, [1.0] * 24, 40, list(range(5)), seeds)
    steps = sorted(set(widths), reverse=True)
    assert len(steps) < len({len(answer) for answer in together})
    assert max(steps) == 24
    assert all(small <= 7 / 8 * large for large, small in pairwise(steps))
    monkeypatch.setattr(completion, "_ENDED_PART", 0.0)
    assert together == complete(target, prompts, [1.0] * 24, 40, list(range(5)), seeds)
    for prompt, seed, answer in zip(prompts, seeds, together, strict=True):
        assert complete(target, [prompt], [1.0], 40, list(range(5)), [seed]) == [answer]
        assert answer[-1] < 5 or len(answer) == 40


def test_growing_layer_holds_what_a_dynamic_layer_holds(monkeypatch):
    monkeypatch.setattr(completion, "_ROOM", 3)
    ours, stock = completion.GrowingLayer(), DynamicLayer()
    rows, grown = 4, set()
    for step, length in enumerate([5, 1, 1, 1, 1, 2, 1, 6, 1, 1]):
        states = torch.randn(rows, 2, length, 8), torch.randn(rows, 2, length, 6)
        for got, expected in zip(ours.update(*states), stock.update(*states), strict=True):
            assert torch.equal(got, expected)
        grown.add(ours.keys.data_ptr())
        if step in (2, 6):
            rows -= 1
            kept = torch.arange(rows) + 1
            ours.reorder_cache(kept)
            stock.reorder_cache(kept)
        if step == 4:
            ours.crop(-2)
            stock.crop(-2)
        assert torch.equal(ours.keys, stock.keys)
        assert torch.equal(ours.values, stock.values)
        assert ours.get_seq_length() == stock.get_seq_length()
    assert len(grown) < 8


@pytest.mark.parametrize("number", [0.0, 1.0])
def test_extreme_draws_are_tokens_of_some_probability(number):
    logits = torch.full((1, 200), -float("inf"))
    logits[0, 3:90] = torch.randn(87)
    token = completion._next_tokens(logits, torch.tensor([1.0]), torch.tensor([number]))
    assert token.item() == (3 if number == 0 else 89)
