"""What cannot verify a tree takes a chain, what cannot be rolled back is decoded plainly; the text is always the same."""

import pytest
import torch
import transformers
from conftest import SIZES, know_the_future, make_head, make_target
from transformers import DynamicCache
from transformers.utils import logging as transformers_logging

from fspad.verification import Verifier
from fspad.verification_mode import VerificationMode, check_rollback

PROMPT = torch.tensor([[1, 2, 3, 4]])
NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


@pytest.fixture
def messages(monkeypatch):
    """What `warning_once` said, without its memory of earlier tests."""
    said = []
    for module in ("generation_fspad", "verification_mode"):
        logger = transformers_logging.get_logger(f"fspad.{module}")
        monkeypatch.setattr(logger, "warning_once", said.append, raising=False)
    return said


def chain_targets():
    falcon = {"alibi": True, "new_decoder_architecture": False, "multi_query": True}
    return {
        "falcon with alibi": transformers.FalconConfig(
            vocab_size=9, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **falcon, **NO_SPECIAL
        ),
        "bloom": transformers.BloomConfig(vocab_size=9, hidden_size=32, n_layer=2, n_head=4, **NO_SPECIAL),
        "mpt": transformers.MptConfig(vocab_size=9, d_model=32, n_layers=2, n_heads=4, use_cache=True, **NO_SPECIAL),
        "gpt_neo": transformers.GPTNeoConfig(
            vocab_size=9,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=8,
            max_position_embeddings=128,
            **NO_SPECIAL,
        ),
        "lfm2": transformers.Lfm2Config(
            **{**SIZES, "vocab_size": 9}, layer_types=["conv", "full_attention", "conv"], **NO_SPECIAL
        ),
    }


def build(config):
    torch.manual_seed(0)
    config.initializer_range = 0.2
    target = transformers.AutoModelForCausalLM.from_config(config).eval()
    target.generation_config.pad_token_id = 0
    return target


@pytest.mark.parametrize("name", chain_targets())
def test_chain(name, messages):
    target = build(chain_targets()[name])
    head = make_head(target)
    for do_sample in (False, True):
        outputs = []
        for assistant in (None, head):
            torch.manual_seed(1)
            outputs.append(
                target.generate(
                    PROMPT,
                    assistant_model=assistant,
                    do_sample=do_sample,
                    max_new_tokens=40,
                    return_dict_in_generate=True,
                )
            )
        assert torch.equal(outputs[0].sequences, outputs[1].sequences)
        assert outputs[1].accept_lengths.sum() == 39
    assert outputs[1].accept_lengths.max() > 1, "no draft was accepted"
    assert any("chain instead of a tree" in message for message in messages)


def test_token_types_of_a_chain_are_those_of_plain_decoding():
    target = build(chain_targets()["gpt_neo"])
    head = make_head(target)
    types = torch.tensor([[5, 3, 7, 2]])
    options = {"token_type_ids": types, "max_new_tokens": 20, "do_sample": False}
    plain = target.generate(PROMPT, **options)
    know_the_future(head, plain, seed=1)
    output = target.generate(PROMPT, assistant_model=head, return_dict_in_generate=True, **options)
    assert torch.equal(output.sequences, plain)
    assert output.accept_lengths.max() > 2


def test_attentions_of_a_target_with_layers_that_have_none():
    target = build(chain_targets()["lfm2"])
    target.set_attn_implementation("eager")
    options = {"max_new_tokens": 15, "do_sample": False, "return_dict_in_generate": True, "output_attentions": True}
    plain = target.generate(PROMPT, **options)
    ours = target.generate(PROMPT, assistant_model=make_head(target), **options)
    for plain_step, our_step in zip(plain.attentions, ours.attentions, strict=True):
        for plain_layer, our_layer in zip(plain_step, our_step, strict=True):
            torch.testing.assert_close(our_layer, plain_layer, atol=1e-4, rtol=1e-4)


def test_image_states_in_the_cache_decode_plainly():
    target = make_target()
    target.config.cross_attention_layers = [1]
    mode, reason = Verifier.decide(target, DynamicCache(config=target.config))
    assert mode is VerificationMode.PLAIN
    assert "image states" in reason


def test_layers_that_hold_different_tokens_are_refused():
    cache = DynamicCache()
    for layer_idx, length in enumerate((4, 7)):
        cache.update(torch.zeros(1, 1, length, 2), torch.zeros(1, 1, length, 2), layer_idx)
    with pytest.raises(RuntimeError, match=r"the same tokens, got lengths \[4, 7\]"):
        check_rollback(cache)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention", "paged|sdpa"])
def test_attention_without_masks_takes_the_chain(attention):
    target = make_target()
    target.config._attn_implementation_internal = attention
    mode, reason = Verifier.decide(target, DynamicCache(config=target.config))
    assert mode is VerificationMode.CHAIN
    assert attention in reason


def test_offloaded_cache_takes_the_chain():
    target = make_target()
    mode, _ = Verifier.decide(target, DynamicCache(config=target.config, offloading=True))
    assert mode is VerificationMode.CHAIN


def test_chunked_attention_takes_the_chain():
    target = make_target()
    target.config.layer_types = ["chunked_attention", "full_attention", "full_attention"]
    mode, _ = Verifier.decide(target, DynamicCache())
    assert mode is VerificationMode.CHAIN


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "mixtral"])
def test_known_families_take_the_tree(family):
    target = make_target(family)
    assert Verifier.decide(target, DynamicCache(config=target.config)) == (VerificationMode.TREE, None)


def test_recurrent_targets_decode_plainly(messages):
    config = transformers.Qwen3NextConfig(
        **{**SIZES, "vocab_size": 9, "num_hidden_layers": 2, "head_dim": 8},
        layer_types=["linear_attention", "full_attention"],
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        **NO_SPECIAL,
    )
    target = build(config)
    plain = target.generate(PROMPT, max_new_tokens=12, do_sample=False)
    output = target.generate(
        PROMPT, assistant_model=make_head(target), max_new_tokens=12, do_sample=False, return_dict_in_generate=True
    )
    assert torch.equal(output.sequences, plain)
    assert output.accept_lengths.tolist() == [1] * 11
    assert any("plain decoding" in message and "recurrent" in message for message in messages)


def test_targets_without_a_cache_decode_plainly(messages):
    target = build(transformers.OpenAIGPTConfig(vocab_size=9, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    options = {"max_new_tokens": 12, "do_sample": False}
    output = target.generate(PROMPT, assistant_model=make_head(target), return_dict_in_generate=True, **options)
    assert torch.equal(output.sequences, target.generate(PROMPT, **options))
    assert any("has no cache" in message for message in messages)


def test_batches_decode_plainly(messages):
    target = make_target(vocab_size=9)
    head = make_head(target)
    prompts = torch.tensor([[0, 0, 1, 2], [3, 4, 5, 6]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 15, "do_sample": False, "eos_token_id": 5}
    plain = target.generate(prompts, **options)
    output = target.generate(prompts, assistant_model=head, return_dict_in_generate=True, **options)
    assert torch.equal(output.sequences, plain)
    lengths = output.accept_lengths
    assert lengths.shape == (2, plain.shape[1] - 4 - 1)
    for row in range(2):
        new = plain[row, 4:].tolist()
        emitted = new.index(5) + 1 if 5 in new else len(new)
        assert lengths[row].tolist() == [1] * (emitted - 1) + [0] * (lengths.shape[1] - emitted + 1)
    assert any("batch has 2 rows" in message for message in messages)
    several = target.generate(
        PROMPT, assistant_model=head, do_sample=True, num_return_sequences=3, max_new_tokens=5, top_k=0
    )
    assert several.shape == (3, 9)


def test_one_token_has_no_step():
    target = make_target()
    for prompts in (PROMPT, PROMPT.repeat(2, 1)):
        output = target.generate(
            prompts, assistant_model=make_head(target), max_new_tokens=1, return_dict_in_generate=True
        )
        assert output.accept_lengths.numel() == 0


def test_long_prompts_are_said_once(messages):
    target = make_target(vocab_size=9)
    head = make_head(target, max_position_embeddings=3)
    plain = target.generate(PROMPT, max_new_tokens=10)
    assert torch.equal(target.generate(PROMPT, assistant_model=head, max_new_tokens=10), plain)
    assert any("The prompt has 4 tokens, the FSPAD head was made for 3" in message for message in messages)
