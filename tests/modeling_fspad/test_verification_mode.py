"""What cannot verify a tree takes a chain, what cannot be rolled back is decoded plainly; the text is always the same."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from transformers import DynamicCache
from transformers.utils import logging as transformers_logging

from fspad.verification import Verifier
from fspad.verification_mode import VerificationMode, check_rollback
from helpers.comparing import assert_same, check_accept_lengths, generate
from helpers.models import SIZES, know_the_future, make_head, make_target
from helpers.other_targets import NO_SPECIAL, make_family

PROMPT = torch.tensor([[1, 2, 3, 4]])


@pytest.fixture
def messages(monkeypatch):
    """What `warning_once` said, without its memory of earlier tests."""
    said = []
    for module in ("generation_fspad", "verification_mode"):
        logger = transformers_logging.get_logger(f"fspad.{module}")
        monkeypatch.setattr(logger, "warning_once", said.append, raising=False)
    return said


def compare(target, head, drafts_future=True, **options):
    """Plain and assisted decoding, greedy and sampled; returns the accept lengths."""
    lengths = []
    for do_sample in (False, True):
        case = {"do_sample": do_sample, "max_new_tokens": 40, **options}
        plain = generate(target, PROMPT, seed=1, **case)
        if drafts_future:
            know_the_future(head, plain.sequences, seed=1)
        ours = generate(target, PROMPT, head, seed=1, **case)
        assert_same(plain, ours, f"{type(target).__name__} {case}")
        check_accept_lengths(ours, ours.sequences.shape[1] - PROMPT.shape[1])
        lengths += ours.accept_lengths.tolist()
    return lengths


def decide(target, cache=None, **model_kwargs):
    cache = DynamicCache(config=target.config.get_text_config(decoder=True)) if cache is None else cache
    return Verifier.decide(target, {"past_key_values": cache, **model_kwargs})


def mode_of(target, **model_kwargs):
    return decide(target, **model_kwargs)[0]


# What the rules know nothing of is tried on the target's own weights
@pytest.mark.parametrize(
    ("family", "mode"),
    [
        ("biogpt", VerificationMode.TREE),
        ("codegen", VerificationMode.TREE),
        ("ctrl", VerificationMode.TREE),
        ("falcon", VerificationMode.TREE),
        ("gpt_neox_japanese", VerificationMode.TREE),
        ("gptj", VerificationMode.TREE),
        ("paligemma", VerificationMode.TREE),
        ("stablelm", VerificationMode.TREE),
        ("xglm", VerificationMode.TREE),
        ("bloom", VerificationMode.CHAIN),
        ("falcon with alibi", VerificationMode.CHAIN),
        ("gpt_neo", VerificationMode.CHAIN),
        ("lfm2", VerificationMode.CHAIN),
        ("mpt", VerificationMode.CHAIN),
        ("cpmant", VerificationMode.PLAIN),
    ],
)
def test_families(family, mode, messages):
    target = make_family(family)
    assert mode_of(target) is mode
    lengths = compare(target, make_head(target))
    assert (max(lengths) > 2) == (mode is not VerificationMode.PLAIN)
    assert any("chain instead of a tree" in message for message in messages) == (mode is VerificationMode.CHAIN)
    assert any("plain decoding" in message for message in messages) == (mode is VerificationMode.PLAIN)


@pytest.mark.parametrize("family", ["falcon with alibi", "lfm2"])
def test_a_head_drafts_a_chain(family):
    target = make_family(family)
    assert max(compare(target, make_head(target), drafts_future=False)) > 1


class WithoutPositions(transformers.LlamaForCausalLM):
    """Takes positions from its cache, where the nodes of a tree stand elsewhere."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return {**super().prepare_inputs_for_generation(*args, **kwargs), "position_ids": None}


def test_targets_without_positions_take_the_chain():
    for seed in range(2):
        target = make_target(vocab_size=9, seed=seed)
        target.__class__ = WithoutPositions
        assert max(compare(target, make_head(target, seed=seed))) > 2
        compare(target, make_head(target, seed=seed), drafts_future=False)


class InexactForSeveralTokens(transformers.LlamaForCausalLM):
    """A target that computes something else for several tokens after a cache, and does not say so."""

    _supports_attention_backend = False

    def forward(self, input_ids=None, past_key_values=None, position_ids=None, attention_mask=None, **kwargs):
        has_past = past_key_values is not None and past_key_values.get_seq_length() > 0
        output = super().forward(
            input_ids,
            past_key_values=past_key_values,
            position_ids=position_ids,
            attention_mask=attention_mask,
            **kwargs,
        )
        if has_past and input_ids.shape[1] > 1:
            output.logits = output.logits.roll(1, dims=-1) * 0.1 + output.logits
        return output


def test_inexact_targets_decode_plainly(messages):
    target = make_target(vocab_size=9)
    target.__class__ = InexactForSeveralTokens
    assert max(compare(target, make_head(target), drafts_future=False)) == 1
    assert any("over several tokens of InexactForSeveralTokens is not known to be exact" in said for said in messages)


def count_forwards(target):
    calls = []
    target.register_forward_pre_hook(lambda *args: calls.append(1))
    return calls


@pytest.mark.parametrize("family", ["gptj", "bloom", "cpmant"])
def test_a_target_is_tried_once_and_draws_no_random_numbers(family):
    target = make_family(family)
    calls = count_forwards(target)
    state = torch.get_rng_state()
    mode = mode_of(target)
    assert calls
    assert torch.equal(torch.get_rng_state(), state)
    calls.clear()
    assert mode_of(target) is mode
    assert not calls
    # A copy with weights of its own is another target
    assert mode_of(copy.deepcopy(target)) is mode
    mode_of(target, attention_mask=torch.tensor([[0, 0, 1, 1]]))
    assert calls, "padding is another case"


def test_nothing_is_tried_of_what_is_known():
    target = make_target()
    calls = count_forwards(target)
    assert mode_of(target) is VerificationMode.TREE
    assert not calls


def test_threads_try_a_target_once():
    target = make_family("gptj")
    calls = count_forwards(target)
    mode_of(copy.deepcopy(target))  # imports and the like
    alone = make_family("gptj")
    expected = count_forwards(alone)
    mode_of(alone)
    calls.clear()
    with ThreadPoolExecutor(4) as pool:
        modes = list(pool.map(lambda _: mode_of(target), range(8)))
    assert modes == [VerificationMode.TREE] * 8
    assert len(calls) == len(expected)


@pytest.mark.parametrize("family", ["falcon", "falcon with alibi", "bloom", "llama"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attentions_that_are_asked_for(family, attention):
    """Some targets compute in another way when they shall return attentions."""
    target = make_target(vocab_size=9) if family == "llama" else make_family(family)
    try:
        target.set_attn_implementation(attention)
    except ValueError:
        pytest.skip(f"{family} has no {attention} attention")
    options = {"max_new_tokens": 20, "do_sample": False, "output_attentions": True}
    plain = generate(target, PROMPT, **options)
    head = make_head(target)
    know_the_future(head, plain.sequences, seed=1)
    ours = generate(target, PROMPT, head, **options)
    assert_same(plain, ours)
    for plain_step, our_step in zip(plain.attentions, ours.attentions, strict=True):
        for plain_layer, our_layer in zip(plain_step, our_step, strict=True):
            assert (plain_layer is None) == (our_layer is None)
            if plain_layer is not None:
                torch.testing.assert_close(our_layer, plain_layer, atol=1e-4, rtol=1e-4)


def test_padding_of_targets_that_are_tried():
    prompt, mask = torch.tensor([[0, 0, 0, 1, 2, 3, 4]]), torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    for family in ("gptj", "bloom"):
        target = make_family(family)
        options = {"max_new_tokens": 20, "do_sample": False, "attention_mask": mask}
        plain = generate(target, prompt, **options)
        head = make_head(target)
        know_the_future(head, plain.sequences, seed=1)
        ours = generate(target, prompt, head, **options)
        assert_same(plain, ours, family)
        assert ours.accept_lengths.max() > 2


def test_compiled_targets_decode_plainly(messages):
    target = make_target(vocab_size=9)
    options = {"max_new_tokens": 4, "do_sample": False}
    plain = target.generate(PROMPT, **options)
    target.forward = torch.compile(target.forward, backend="eager")
    output = target.generate(PROMPT, assistant_model=make_head(target), return_dict_in_generate=True, **options)
    assert torch.equal(output.sequences, plain)
    assert output.accept_lengths.tolist() == [1] * 3
    assert any("is compiled" in message for message in messages)


def test_attention_to_a_selection_of_keys_decodes_plainly():
    target = make_target()
    target.config.index_topk = 4
    assert mode_of(target) is VerificationMode.PLAIN


def test_token_types_of_a_chain_are_those_of_plain_decoding():
    target = make_family("gpt_neo")
    head = make_head(target)
    types = torch.tensor([[5, 3, 7, 2]])
    options = {"token_type_ids": types, "max_new_tokens": 20, "do_sample": False}
    plain = target.generate(PROMPT, **options)
    know_the_future(head, plain, seed=1)
    output = target.generate(PROMPT, assistant_model=head, return_dict_in_generate=True, **options)
    assert torch.equal(output.sequences, plain)
    assert output.accept_lengths.max() > 2


def test_attentions_of_a_target_with_layers_that_have_none():
    target = make_family("lfm2")
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
    mode, reason = decide(target, DynamicCache(config=target.config))
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
    mode, reason = decide(target, DynamicCache(config=target.config))
    assert mode is VerificationMode.CHAIN
    assert attention in reason


def test_offloaded_cache_takes_the_chain():
    target = make_target()
    mode, _ = decide(target, DynamicCache(config=target.config, offloading=True))
    assert mode is VerificationMode.CHAIN


def test_chunked_attention_takes_the_chain():
    target = make_target()
    target.config.layer_types = ["chunked_attention", "full_attention", "full_attention"]
    mode, _ = decide(target, DynamicCache())
    assert mode is VerificationMode.CHAIN


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "mixtral"])
def test_known_families_take_the_tree(family):
    target = make_target(family)
    assert decide(target, DynamicCache(config=target.config)) == (VerificationMode.TREE, None)


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
    target = transformers.AutoModelForCausalLM.from_config(config).eval()
    target.generation_config.pad_token_id = 0
    plain = target.generate(PROMPT, max_new_tokens=12, do_sample=False)
    output = target.generate(
        PROMPT, assistant_model=make_head(target), max_new_tokens=12, do_sample=False, return_dict_in_generate=True
    )
    assert torch.equal(output.sequences, plain)
    assert output.accept_lengths.tolist() == [1] * 11
    assert any("plain decoding" in message and "recurrent" in message for message in messages)


def test_targets_without_a_cache_decode_plainly(messages):
    config = transformers.OpenAIGPTConfig(vocab_size=9, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    target = transformers.AutoModelForCausalLM.from_config(config).eval()
    target.generation_config.pad_token_id = 0
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


@pytest.mark.filterwarnings("ignore")
def test_targets_that_quantize_all_tokens_together_decode_plainly():
    target = make_target(vocab_size=33)
    head = make_head(target, num_draft_tokens=16)
    quantized = torch.ao.quantization.quantize_dynamic(target, {torch.nn.Linear}, dtype=torch.qint8)
    assert mode_of(quantized) is VerificationMode.PLAIN
    prompt = torch.tensor([[1, 2, 3, 4]])
    plain = quantized.generate(prompt, max_new_tokens=30, do_sample=False)
    ours = quantized.generate(prompt, max_new_tokens=30, do_sample=False, assistant_model=head)
    assert torch.equal(plain, ours)
