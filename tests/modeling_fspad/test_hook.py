import importlib.util
import sys

import pytest
import torch
import transformers
from transformers import GenerationMixin

from fspad import hook
from fspad.versions import check_transformers_version
from helpers.models import make_head, make_target

PROMPT = torch.tensor([[1, 2, 3]])


def load_again(name):
    """Load the hook's file a second time, as another revision of the remote code would be."""
    spec = importlib.util.spec_from_file_location(f"fspad.{name}", hook.__file__)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_wrapped_once_however_often_it_is_installed():
    before = [getattr(owner, name) for owner, name in hook.WRAPPERS]
    assert all(getattr(method, "_fspad_hook", None) == 1 for method in before)
    hook.install_hook()
    load_again("another_revision_of_hook").install_hook()
    assert [getattr(owner, name) for owner, name in hook.WRAPPERS] == before


@pytest.fixture
def stock(monkeypatch):
    """Puts stock methods back, as a library does that patches transformers in its own way."""

    def put_back(*names):
        for owner, name in hook.WRAPPERS:
            if name in names:
                monkeypatch.setattr(owner, name, getattr(owner, name).__wrapped__)

    return put_back


@pytest.mark.parametrize(
    "names",
    [("_assisted_decoding",), ("_validate_generation_mode",), ("_assisted_decoding", "_validate_generation_mode")],
)
def test_the_hook_heals_while_a_part_of_it_is_left(stock, names):
    target = make_target(vocab_size=9)
    head = make_head(target)
    plain = target.generate(PROMPT, max_new_tokens=20, do_sample=False)
    stock(*names)
    output = target.generate(
        PROMPT, assistant_model=head, max_new_tokens=20, do_sample=False, return_dict_in_generate=True
    )
    assert torch.equal(output.sequences, plain)
    assert output.accept_lengths.max() > 1
    assert all(getattr(getattr(owner, name), "_fspad_hook", None) == 1 for owner, name in hook.WRAPPERS)


def test_a_hook_that_is_gone_is_named_and_installed_again(stock):
    target = make_target(vocab_size=9)
    head = make_head(target)
    plain = target.generate(PROMPT, max_new_tokens=20, do_sample=False)
    stock("_assisted_decoding", "_validate_generation_mode", "get_generation_mode")
    with pytest.raises(AttributeError, match="a hook in `generate`, which another library has replaced"):
        target.generate(PROMPT, assistant_model=head, max_new_tokens=20, do_sample=False)
    assert torch.equal(target.generate(PROMPT, assistant_model=head, max_new_tokens=20, do_sample=False), plain)


def test_a_head_of_another_revision_is_served_by_the_hook_that_is_there():
    class ForeignHead(torch.nn.Module):
        config = make_target().config

        def assisted_decoding(self, target, input_ids, **kwargs):
            self.kwargs = kwargs
            return input_ids

    head, target = ForeignHead(), make_target()
    assert target.generate(PROMPT, assistant_model=head, max_new_tokens=5) is not None
    names = {"logits_processor", "stopping_criteria", "generation_config", "assistant_model", "past_key_values"}
    assert names <= set(head.kwargs)


def test_stock_assistants_get_stock_behaviour():
    target, assistant = make_target(), make_target(num_hidden_layers=1)
    plain = target.generate(PROMPT, max_new_tokens=20, do_sample=False)
    assisted = target.generate(PROMPT, max_new_tokens=20, do_sample=False, assistant_model=assistant)
    assert torch.equal(assisted, plain)
    with pytest.raises(ValueError, match="different tokenizers"):
        target.generate(PROMPT, assistant_model=make_target(vocab_size=50))
    with pytest.raises(ValueError, match="num_return_sequences"):
        target.generate(PROMPT, assistant_model=assistant, num_return_sequences=2, do_sample=True)
    lookup = target.generate(PROMPT, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=2)
    assert torch.equal(lookup, plain)


def test_signature_is_kept():
    import inspect

    assert "inputs_tensor" in inspect.signature(GenerationMixin._assisted_decoding).parameters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "greedy decoding and sampling, got options that ask for beam search"),
        ({"num_beams": 2, "do_sample": True}, "got options that ask for beam sample"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "got options that ask for contrastive search"),
        ({"prompt_lookup_num_tokens": 3}, "two sources of drafts"),
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "static"}, "rolled back, got a static one"),
        ({"assistant_ensemble_weight": 0.5}, "an FSPAD head never changes the text: drop `assistant_ensemble_weight`"),
        ({"speculation_type": "dflash"}, "drop `speculation_type`"),
        ({"num_assistant_tokens": 0}, "num_assistant_tokens must be a positive integer, got 0"),
        ({"num_assistant_tokens": -3}, "num_assistant_tokens must be a positive integer, got -3"),
    ],
)
def test_options_that_cannot_be_assisted_are_refused(options, message):
    target = make_target()
    with pytest.raises(ValueError, match=message):
        target.generate(PROMPT, assistant_model=make_head(target), max_new_tokens=5, **options)


def test_encoder_decoder_targets_are_refused():
    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    target = transformers.T5ForConditionalGeneration(config).eval()
    with pytest.raises(ValueError, match="decoder-only models, got the encoder-decoder 't5': call"):
        target.generate(PROMPT, assistant_model=make_head(make_target()), max_new_tokens=5)


def test_heads_of_other_targets_are_refused():
    target = make_target()
    with pytest.raises(ValueError, match="the head has hidden_size=64, LlamaForCausalLM has hidden_size=32"):
        target.generate(PROMPT, assistant_model=make_head(make_target(hidden_size=64)))
    with pytest.raises(ValueError, match="the head has vocab_size=50, LlamaForCausalLM has vocab_size=97"):
        target.generate(PROMPT, assistant_model=make_head(make_target(vocab_size=50)))


def test_targets_with_other_embedding_sizes_are_refused():
    config = transformers.OPTConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, ffn_dim=40, num_attention_heads=4, word_embed_proj_dim=16
    )
    target = transformers.OPTForCausalLM(config).eval()
    with pytest.raises(ValueError, match="needs token embeddings of the hidden size 32, those of OPTForCausalLM have"):
        target.generate(PROMPT, assistant_model=make_head(make_target()), max_new_tokens=5)


def test_bad_knobs_and_prompts_are_refused():
    target = make_target()
    head = make_head(target)
    head.config.draft_top_k = 0
    with pytest.raises(ValueError, match="draft_top_k must be an integer from 1 to 256, got 0"):
        target.generate(PROMPT, assistant_model=head)
    with pytest.raises(ValueError, match="prompt is empty"):
        target.generate(PROMPT[:, :0], assistant_model=make_head(target), max_new_tokens=5)


def test_releases_outside_of_the_tested_range(recwarn):
    with pytest.raises(ImportError, match=r"transformers>=5\.15.*found 5\.14\.1"):
        check_transformers_version("5.14.1")
    with pytest.raises(ImportError, match="found 4"):
        check_transformers_version("4.57.0")
    check_transformers_version("5.15.0")
    check_transformers_version()
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"tested with transformers 5\.15 to .*, found 6\.0\.0\.dev0"):
        check_transformers_version("6.0.0.dev0")


def test_a_release_without_the_methods_is_named(monkeypatch):
    monkeypatch.delattr(GenerationMixin, "_assisted_decoding")
    with pytest.raises(ImportError, match=r"has no GenerationMixin\._assisted_decoding"):
        hook.install_hook()
