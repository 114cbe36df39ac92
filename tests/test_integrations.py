"""Targets as people use them: in pipelines, placed by accelerate."""

import pytest
import tokenizers
import torch
from conftest import make_head, make_target
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

import fspad

PROMPT = torch.tensor([[1, 2, 3, 4]])
OPTIONS = {"max_new_tokens": 25, "do_sample": False}


def test_pipeline():
    letters = {letter: i for i, letter in enumerate("_abcdefgh")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="_"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="_", eos_token="h")
    target = make_target(vocab_size=9, eos_token_id=8, pad_token_id=0)
    head = make_head(target)
    calls = []
    original = head.assisted_decoding
    head.assisted_decoding = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    plain = pipeline("text-generation", model=target, tokenizer=tokenizer)
    assisted = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=head)
    for text in ("abc", "bad"):
        assert assisted(text, **OPTIONS) == plain(text, **OPTIONS)
    assert len(calls) == 2


def test_device_map(tmp_path):
    target = make_target(vocab_size=9)
    target.save_pretrained(tmp_path)
    plain = target.generate(PROMPT, **OPTIONS)
    placed = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert torch.equal(placed.generate(PROMPT, assistant_model=make_head(target), **OPTIONS), plain)


def test_accelerate_hooks_on_every_module(tmp_path):
    """What `device_map` does to the modules of a target that is spread over devices."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    target = make_target(vocab_size=9)
    plain = target.generate(PROMPT, **OPTIONS)
    for module in target.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    assert torch.equal(target.generate(PROMPT, assistant_model=make_head(target), **OPTIONS), plain)


@pytest.mark.parametrize("draft_vocab_size", [None, 7])
def test_offloaded_weights(draft_vocab_size):
    import accelerate

    target = make_target(vocab_size=9)
    plain = target.generate(PROMPT, **OPTIONS)
    head = make_head(target, draft_vocab_size=draft_vocab_size)
    accelerate.cpu_offload(target, execution_device=torch.device("cpu"))
    assert target.get_output_embeddings().weight.is_meta
    assert torch.equal(target.generate(PROMPT, assistant_model=head, **OPTIONS), plain)
    assert not any(parameter.is_meta for parameter in fspad.FSPADModel.from_target(target).parameters())


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gemma2", {"final_logit_softcapping": 3.0, "sliding_window": 8, "head_dim": 8}),
        ("cohere", {"logit_scale": 0.5}),
        ("granite", {"logits_scaling": 4.0}),
    ],
)
def test_scores_of_drafts_have_the_targets_scale(family, options):
    from conftest import SIZES
    from transformers import AutoConfig

    from fspad.target import FeatureTap, LMHead

    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, "vocab_size": 9, **special, **options})
    target = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad(), FeatureTap(target) as tap, tap.record() as recorded:
        logits = target(PROMPT).logits
    lm_head = LMHead(target)
    torch.testing.assert_close(lm_head(recorded[0]), logits, atol=1e-5, rtol=1e-5)
    ids = torch.tensor([3, 8, 1])
    torch.testing.assert_close(LMHead(target, ids)(recorded[0]), logits[..., ids], atol=1e-5, rtol=1e-5)
    plain = target.generate(PROMPT, **OPTIONS)
    assert torch.equal(target.generate(PROMPT, assistant_model=make_head(target), **OPTIONS), plain)
