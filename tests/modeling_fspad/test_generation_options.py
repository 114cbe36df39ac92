"""Every option of `generate`: the same with a head as without, or refused, or said why it has no meaning here.

A release of transformers with a new option fails here until somebody has decided what a head does with it.
"""

import pytest
import tokenizers
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from helpers.models import make_head, make_target

VOCAB_SIZE = 9
SEED = 8  # of a target that does not repeat itself
PROMPT = torch.tensor([[1, 2, 3, 4, 1, 2, 3]])
SAMPLED = {"do_sample": True, "top_k": 0}
OUTPUTS = {"return_dict_in_generate": True}

# Options with values that are tried: text and outputs are those of plain decoding
HONOURED = {
    "assistant_confidence_threshold": {"assistant_confidence_threshold": 0.9},
    "bad_words_ids": {"bad_words_ids": [[1], [0, 6]]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [0, 1, 2, 5]},
    "bos_token_id": {"bos_token_id": 2, "inputs": None},
    "cache_config": {"cache_implementation": "dynamic", "cache_config": {}},
    "cache_implementation": {"cache_implementation": "dynamic"},
    "disable_compile": {"disable_compile": True},
    "do_sample": SAMPLED,
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 2},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
    "eos_token_id": {"eos_token_id": [5, 7], "max_new_tokens": 60},
    "epsilon_cutoff": {**SAMPLED, "epsilon_cutoff": 0.05},
    "eta_cutoff": {**SAMPLED, "eta_cutoff": 0.1},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (3, 1.3), "eos_token_id": 7},
    "forced_bos_token_id": {"forced_bos_token_id": 6, "inputs": PROMPT[:, :1]},
    "forced_eos_token_id": {"forced_eos_token_id": 6},
    "guidance_scale": {"guidance_scale": 3.0},
    "max_length": {"max_length": 19, "max_new_tokens": None},
    "max_new_tokens": {"max_new_tokens": 11},
    "max_time": {"max_time": 1000.0},
    "min_length": {"min_length": 20, "eos_token_id": [3, 5, 7]},
    "min_new_tokens": {"min_new_tokens": 12, "eos_token_id": [3, 5, 7]},
    "min_p": {**SAMPLED, "min_p": 0.2},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 3},
    "num_assistant_tokens": {"num_assistant_tokens": 3},
    "num_return_sequences": {**SAMPLED, "num_return_sequences": 2},
    "output_attentions": {"output_attentions": True, **OUTPUTS},
    "output_hidden_states": {"output_hidden_states": True, **OUTPUTS},
    "output_logits": {"output_logits": True, **OUTPUTS},
    "output_scores": {"output_scores": True, "temperature": 0.7, **SAMPLED, **OUTPUTS},
    "pad_token_id": {"pad_token_id": 3},
    "prefill_chunk_size": {"prefill_chunk_size": 2},
    "remove_invalid_values": {"remove_invalid_values": True},
    "renormalize_logits": {**SAMPLED, "renormalize_logits": True, "repetition_penalty": 1.3},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "sequence_bias": {"sequence_bias": [[[4, 5], 3.0], [[6], -2.0]]},
    "stop_strings": {"stop_strings": ["ef", "h"], "tokenizer": None, "max_new_tokens": 60},
    "suppress_tokens": {"suppress_tokens": [0, 3]},
    "temperature": {**SAMPLED, "temperature": 0.5},
    "token_healing": {"token_healing": True, "tokenizer": None},
    "top_h": {**SAMPLED, "top_h": 0.4},
    "top_k": {**SAMPLED, "top_k": 3},
    "top_p": {**SAMPLED, "top_p": 0.6},
    "typical_p": {**SAMPLED, "typical_p": 0.5},
    "use_cache": {"use_cache": True},
    "watermarking_config": {**SAMPLED, "watermarking_config": {"bias": 2.5, "seeding_scheme": "lefthash"}},
}

# Options that ask for what a head cannot do exactly, and what the error says
REFUSED = {
    "assistant_early_exit": ({"assistant_early_exit": 1}, "two sources of drafts"),
    "assistant_ensemble_weight": ({"assistant_ensemble_weight": 0.5}, "assistant_ensemble_weight"),
    "cache_implementation": ({"cache_implementation": "static"}, "static"),
    "constraints": ({"constraints": [1], "num_beams": 2}, "constrained beam search"),
    "diversity_penalty": ({"diversity_penalty": 0.5, "num_beams": 2, "num_beam_groups": 2}, "group beam search"),
    "dola_layers": ({"dola_layers": "low"}, "dola_layers"),
    "force_words_ids": ({"force_words_ids": [[3]], "num_beams": 2}, "constrained beam search"),
    "num_assistant_tokens": ({"num_assistant_tokens": -1}, "num_assistant_tokens"),
    "num_beam_groups": ({"num_beam_groups": 2, "num_beams": 2}, "group beam search"),
    "num_beams": ({"num_beams": 2}, "beam search"),
    "penalty_alpha": ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"),
    "prompt_lookup_num_tokens": ({"prompt_lookup_num_tokens": 3}, "two sources of drafts"),
    "speculation_type": ({"speculation_type": "dflash"}, "speculation_type"),
    "use_cache": ({"use_cache": False}, "needs the target's cache"),
    "use_mtp": ({"use_mtp": True}, "two sources of drafts"),
}

# Options that change nothing, with a value that is tried where it can be given, and the reason
WITHOUT_MEANING = {
    "assistant_lookbehind": (4, "for assistants with another tokenizer"),
    "compile_config": (None, "for caches that can be compiled, which are refused"),
    "continuous_batching_config": (None, "for `generate_batch`, which takes no assistant"),
    "decoder_start_token_id": (3, "for encoder-decoder models, which are refused"),
    "early_stopping": (True, "for beam search, which is refused"),
    "is_assistant": (
        None,
        "for the drafts of an assistant that calls `generate` itself; plain decoding fails with it",
    ),
    "length_penalty": (2.0, "for beam search, which is refused"),
    "low_memory": (True, "for contrastive search, which is refused"),
    "max_cache_len": (64, "for static caches, which are refused"),
    "max_matching_ngram_size": (3, "for prompt lookup, which is refused"),
    "num_assistant_tokens_schedule": ("heuristic", "the size of a draft follows from the head's configuration"),
    "target_lookbehind": (4, "for assistants with another tokenizer"),
    "transformers_version": (None, "tells who wrote the configuration"),
}


def make_tokenizer():
    letters = {letter: i for i, letter in enumerate("_abcdefgh")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="_"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="_", eos_token="h", bos_token="_")


def run(target, head, options):
    options = {"inputs": PROMPT, "max_new_tokens": 25, "do_sample": False, **options}
    if "tokenizer" in options:
        options["tokenizer"] = make_tokenizer()
    torch.manual_seed(1)
    return target.generate(assistant_model=head, **options)


def check(options):
    target = make_target(vocab_size=VOCAB_SIZE, seed=SEED)
    if "output_attentions" in options:
        target.set_attn_implementation("eager")
    head = make_head(target)
    plain, ours = run(target, None, options), run(target, head, options)
    if isinstance(plain, torch.Tensor):
        plain, ours = {"sequences": plain}, {"sequences": ours}
    assert torch.equal(plain["sequences"], ours["sequences"])
    for name in ("scores", "logits", "hidden_states", "attentions"):
        steps = plain.get(name), ours.get(name)
        assert (steps[0] is None) == (steps[1] is None)
        for plain_step, our_step in zip(*(step or () for step in steps), strict=True):
            torch.testing.assert_close(our_step, plain_step, atol=1e-4, rtol=1e-4)
    return plain["sequences"]


def test_every_option_is_decided():
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    decided = HONOURED.keys() | REFUSED.keys() | WITHOUT_MEANING.keys()
    assert not fields - decided, "decide what a head does with these options, and try them here"


@pytest.mark.parametrize("name", HONOURED)
def test_honoured(name):
    if not hasattr(GenerationConfig(), name):
        pytest.skip("not in this release of transformers")
    check(HONOURED[name])


# Values that forbid what plain decoding writes here: were they ignored, nothing would be tested
@pytest.mark.parametrize(
    "name",
    ["bad_words_ids", "guidance_scale", "no_repeat_ngram_size", "sequence_bias", "suppress_tokens", "temperature"],
)
def test_values_that_are_tried_matter(name):
    options = HONOURED[name]
    without = {key: value for key, value in options.items() if key != name}
    assert check(options).tolist() != check(without).tolist()


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    options, message = REFUSED[name]
    target = make_target(vocab_size=VOCAB_SIZE, seed=SEED)
    with pytest.raises(ValueError, match=message):
        run(target, make_head(target), options)


@pytest.mark.parametrize("name", [name for name, (value, _) in WITHOUT_MEANING.items() if value is not None])
def test_without_meaning(name):
    if not hasattr(GenerationConfig(), name):
        pytest.skip("not in this release of transformers")
    value, _ = WITHOUT_MEANING[name]
    target = make_target(vocab_size=VOCAB_SIZE, seed=SEED)
    # Plain decoding without the option: what has no meaning must not change the text with a head either
    assert torch.equal(run(target, make_head(target), {name: value}), run(target, None, {}))
