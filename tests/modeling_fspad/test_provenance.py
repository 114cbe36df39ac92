"""Which target a head belongs to, and what is said when it meets another."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from transformers.utils import logging

from fspad import FSPADConfig, FSPADModel, provenance
from fspad.provenance import (
    as_hub_id,
    check_vocabulary,
    note_default_revision,
    record_target,
    sample_weights,
    target_revision,
    vocabulary_hash,
)
from helpers.dialogues import make_tokenizer
from helpers.models import make_head, make_target
from helpers.trainers import make_trainer

NAME, SHA, OTHER_SHA = "somebody/target", "a" * 40, "b" * 40
SHIPPED = Path(__file__).parents[2] / "examples" / "heads" / "smollm2-135m-instruct"


def tokenizer_of(vocab):
    return SimpleNamespace(get_vocab=lambda: vocab, name_or_path="somebody/tokenizer")


def test_vocabulary_hash_is_of_sorted_tokens_and_ids():
    expected = hashlib.sha256(b'[["a",1],["b",0],["\\u00e9",2]]').hexdigest()
    assert vocabulary_hash(tokenizer_of({"b": 0, "a": 1, "é": 2})) == expected
    assert vocabulary_hash(tokenizer_of({"é": 2, "a": 1, "b": 0})) == expected
    assert vocabulary_hash(SimpleNamespace(tokenizer=tokenizer_of({"é": 2, "a": 1, "b": 0}))) == expected
    for vocab in ({"b": 1, "a": 0, "é": 2}, {"b": 0, "a": 1}, {"b": 0, "a": 1, "e": 2}, {"\ud800": 0}):
        assert vocabulary_hash(tokenizer_of(vocab)) != expected


def test_vocabulary_hash_of_a_tokenizer_survives_saving(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    before = vocabulary_hash(tokenizer)
    assert vocabulary_hash(type(tokenizer).from_pretrained(tmp_path)) == before
    tokenizer.add_tokens(["new"])
    assert vocabulary_hash(tokenizer) != before


@pytest.mark.parametrize("name", ["somebody/target", "gpt2", "a.b/c_d-1.5B"])
def test_hub_ids(name):
    assert as_hub_id(name) == name


@pytest.mark.parametrize(
    "name",
    [None, "", 5, "/data/target", "./target", "../x/y", "a/..", "a/b/c", "~/x", "C:\\x", "x" * 97, "a b", "a/b\n"],
)
def test_what_is_no_hub_id(name):
    assert as_hub_id(name) is None


def test_folders_are_no_hub_ids(tmp_path, monkeypatch):
    (tmp_path / "somebody" / "target").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert as_hub_id(NAME) is None


def test_a_head_records_name_and_revision_of_its_target(tmp_path):
    config = make_target().config
    config._commit_hash = SHA
    for name, expected in ((NAME, (NAME, SHA)), (str(tmp_path), (None, None)), ("", (None, None))):
        config._name_or_path = name
        head = FSPADConfig.from_target(config)
        assert (head.target_model_name, head.target_revision) == expected
    assert FSPADConfig.from_target(make_target().config).target_revision is None


def test_the_revision_in_the_cache_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    config = make_target().config
    config._name_or_path = NAME
    note_default_revision(config)
    assert target_revision(config) is None  # not in the cache

    repository = tmp_path / "models--somebody--target"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(SHA)
    (repository / "snapshots" / SHA).mkdir(parents=True)
    (repository / "snapshots" / SHA / "config.json").write_text("{}")
    note_default_revision(config)
    assert target_revision(config) == SHA
    assert "_commit_hash" not in config.to_dict()
    (repository / "refs" / "main").write_text(OTHER_SHA)
    note_default_revision(config)
    assert target_revision(config) == SHA  # what is known is not overruled


@pytest.fixture
def said(monkeypatch):
    """The warnings that come out, without the logger's memory of earlier tests."""
    messages = []
    logging.warning_once.cache_clear()
    monkeypatch.setattr(provenance.logger, "warning", messages.append)
    return messages


def generate(recorded, actual):
    """Generate with a head that records `(name, revision)` on a target that was loaded from another such pair."""
    target = make_target()
    head = make_head(target, target_model_name=recorded[0], target_revision=recorded[1])
    target.config._name_or_path = actual[0]
    target.config._commit_hash = actual[1]
    prompt = torch.tensor([[1, 2, 3]])
    options = {"max_new_tokens": 4, "do_sample": False}
    plain = target.generate(prompt, **options)
    for _ in range(2):
        assert torch.equal(target.generate(prompt, assistant_model=head, **options), plain)


@pytest.mark.parametrize(
    ("recorded", "actual", "words"),
    [
        ((NAME, None), ("somebody/else", None), ["'somebody/target'", "'somebody/else'"]),
        ((NAME, SHA), ("somebody/else", SHA), ["'somebody/target'", "'somebody/else'"]),
        ((NAME, SHA), (NAME, OTHER_SHA), [SHA, OTHER_SHA]),
    ],
)
def test_another_target_is_named_once(recorded, actual, words, said):
    generate(recorded, actual)
    assert len(said) == 1
    assert all(word in said[0] for word in words)


@pytest.mark.parametrize(
    ("recorded", "actual"),
    [
        ((NAME, SHA), (NAME, SHA)),
        ((NAME, SHA), (NAME, None)),
        ((NAME, None), (NAME, SHA)),
        ((NAME, "main"), (NAME, SHA)),
        ((NAME, SHA), ("", None)),
        ((NAME, SHA), ("/data/target", OTHER_SHA)),
        ((NAME, SHA), ("./models/target", None)),
        ((NAME, SHA), ("requantizer/target-GGUF", OTHER_SHA)),
        ((None, None), ("somebody/else", SHA)),
        (("/data/target", None), ("somebody/else", SHA)),
        (("openai-community/gpt2", None), ("gpt2", None)),
    ],
)
def test_the_same_target_under_another_name_is_not_mentioned(recorded, actual, said):
    generate(recorded, actual)
    assert said == []


def test_an_adapter_counts_as_its_base_model(said):
    peft = pytest.importorskip("peft")
    target = make_target()
    target.config._name_or_path = NAME
    head = make_head(target)
    assert head.config.target_model_name == NAME
    adapted = peft.get_peft_model(target, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    prompt = torch.tensor([[1, 2, 3]])
    adapted.generate(input_ids=prompt, assistant_model=head, max_new_tokens=3)
    assert said == []
    head.config.target_model_name = "somebody/else"
    adapted.generate(input_ids=prompt, assistant_model=head, max_new_tokens=3)
    assert len(said) == 1


def test_another_vocabulary_is_refused_with_both_hashes():
    right, wrong = tokenizer_of({"a": 0, "b": 1}), tokenizer_of({"a": 1, "b": 0})
    config = FSPADConfig.from_target(make_target().config, target_vocab_hash=vocabulary_hash(right))
    check_vocabulary(config, right)
    with pytest.raises(ValueError, match="another vocabulary") as error:
        check_vocabulary(config, wrong)
    for words in (vocabulary_hash(right), vocabulary_hash(wrong), "somebody/tokenizer", "target_vocab_hash = None"):
        assert words in str(error.value)


def test_the_shipped_head_knows_the_vocabulary_of_its_target():
    config = FSPADConfig.from_pretrained(SHIPPED)
    assert config.target_model_name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert len(config.target_vocab_hash) == 64
    with pytest.raises(ValueError, match="was trained with another vocabulary"):
        check_vocabulary(config, make_tokenizer())


def test_training_records_and_checks_the_vocabulary(tmp_path):
    tokenizer = make_tokenizer()
    target = make_target()
    target.config._name_or_path = NAME
    head = make_head(target)
    target.config._commit_hash = SHA
    make_trainer(tmp_path, target, head=head)
    assert (head.config.target_vocab_hash, head.config.target_revision) == (None, SHA)

    make_trainer(tmp_path, target, head=head, processing_class=tokenizer).save_model()
    assert FSPADModel.from_pretrained(tmp_path).config.target_vocab_hash == vocabulary_hash(tokenizer)

    make_trainer(tmp_path, target, head=head, processing_class=tokenizer)
    tokenizer.add_tokens(["new"])
    with pytest.raises(ValueError, match="another vocabulary"):
        make_trainer(tmp_path, target, head=head, processing_class=tokenizer)


def test_training_does_not_record_the_revision_of_another_target(tmp_path):
    target = make_target()
    target.config._name_or_path, target.config._commit_hash = NAME, SHA
    head = make_head(target, target_model_name="somebody/else", target_revision=None)
    make_trainer(tmp_path, target, head=head)
    assert (head.config.target_model_name, head.config.target_revision) == ("somebody/else", None)


def with_lm_head(seed=0, change=None):
    target = make_target(seed=seed)
    if change is not None:
        with torch.no_grad():
            weight = target.get_output_embeddings().weight
            weight.copy_(change(weight))
    return target


def rounded(weight, levels=16):
    """As 4-bit quantization leaves it."""
    scale = weight.abs().amax(dim=1, keepdim=True) / (levels / 2)
    return (weight / scale).round() * scale


@pytest.mark.parametrize(
    ("make_other", "is_another"),
    [
        (lambda: make_target(), False),
        (lambda: make_target().bfloat16(), False),
        (lambda: make_target().half(), False),
        (lambda: with_lm_head(change=rounded), False),
        (lambda: with_lm_head(change=lambda weight: weight + 0.1 * weight.std() * torch.randn_like(weight)), False),
        (lambda: make_target(seed=1), True),
        (lambda: with_lm_head(change=torch.zeros_like), True),
    ],
)
def test_targets_are_told_apart_by_their_weights(make_other, is_another, said):
    head = make_head(target := make_target())
    head.config.target_weights = sample_weights(target)
    assert len(head.config.target_weights) == 32
    other = make_other()
    prompt = torch.tensor([[1, 2, 3]], device=other.device)
    for _ in range(2):
        other.generate(prompt, assistant_model=head.to(other.dtype), max_new_tokens=3)
    messages = [message for message in said if "with other weights" in message]
    assert len(messages) == is_another


def test_weights_that_are_not_at_hand_are_not_compared():
    assert sample_weights(make_target().to("meta")) is None
    assert sample_weights(with_lm_head(change=lambda weight: torch.full_like(weight, torch.nan))) is None
    target = make_target()
    target.lm_head.weight.requires_grad_(False)
    target.lm_head.weight.data = target.lm_head.weight.data.to(torch.int8)
    assert sample_weights(target) is None


def test_the_sample_is_saved_and_checked(tmp_path):
    head = make_head(target := make_target())
    record_target(head.config, target, None)
    head.save_pretrained(tmp_path)
    assert FSPADModel.from_pretrained(tmp_path).config.target_weights == sample_weights(target)
    for value in ([0.1] * 31, [0.1] * 31 + ["x"], "0.1", [float("nan")] * 32, [1e9] * 32):
        with pytest.raises(ValueError, match="target_weights must be a"):
            FSPADConfig(target_weights=value)
