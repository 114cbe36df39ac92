"""What the training arguments refuse, and what they make of the machine."""

import pytest
import torch
from transformers.utils import logging

from fspad.trainer import FSPADTrainingArguments, training_arguments
from helpers.trainers import make_trainer


def make_arguments(folder, **values):
    return FSPADTrainingArguments(output_dir=str(folder), report_to="none", **values)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("per_device_train_batch_size", 0, "of at least 1, got 0"),
        ("per_device_eval_batch_size", 0, "of at least 1, got 0"),
        ("gradient_accumulation_steps", 0, "of at least 1, got 0"),
        ("learning_rate", -1e-4, "above 0, got -0.0001"),
        ("learning_rate", float("nan"), "above 0, got nan"),
        ("weight_decay", -0.1, "of at least 0, got -0.1"),
        ("max_grad_norm", -1.0, "of at least 0, got -1.0"),
        ("max_grad_value", 0.0, "above 0, got 0.0"),
        ("max_length", 2, "of at least 3, got 2"),
        ("draft_vocab_size", 0, "of at least 1, got 0"),
        ("num_draft_steps", 0, "of at least 1, got 0"),
        ("draft_step_decay", 0.0, "above 0, got 0.0"),
        ("feature_loss_weight", -1.0, "of at least 0, got -1.0"),
        ("logits_loss_weight", float("inf"), "of at least 0, got inf"),
        ("feature_noise", -0.1, "of at least 0, got -0.1"),
        ("logits_chunk_size", 0, "of at least 1, got 0"),
        ("num_eval_prompts", -1, "of at least 0, got -1"),
        ("eval_max_new_tokens", 0, "of at least 1, got 0"),
        ("num_draft_tokens", "many", "from 1 to 1024, `auto` or `measure`, got 'many'"),
        ("num_draft_tokens", "0", "from 1 to 1024, `auto` or `measure`, got '0'"),
        ("learning_rate", "fast", "above 0, got 'fast'"),
    ],
)
def test_values_out_of_range(tmp_path, name, value, message):
    with pytest.raises(ValueError, match=f"expected {name} .*{message}"):
        make_arguments(tmp_path, **{name: value})


@pytest.mark.parametrize(("name", "value"), [("label_smoothing_factor", 0.1), ("neftune_noise_alpha", 5.0)])
def test_what_has_no_effect_is_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"expected no {name}, got {value}: a head learns .* Leave it out"):
        make_arguments(tmp_path, **{name: value})


def test_a_loss_without_terms_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected feature_loss_weight or logits_loss_weight above 0"):
        make_arguments(tmp_path, feature_loss_weight=0.0, logits_loss_weight=0.0)


def test_log_to_what_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(training_arguments, "get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(ImportError, match="report_to=comet_ml needs a package that is missing: install comet_ml"):
        FSPADTrainingArguments(output_dir=str(tmp_path), report_to="comet_ml")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about processors")
@pytest.mark.parametrize("native", [torch.float32, torch.bfloat16])
def test_bf16_on_a_processor(tmp_path, monkeypatch, native):
    """It needs no other flag, and is what the processor has."""
    warned = []
    monkeypatch.setattr(training_arguments, "native_dtype", lambda device: native)
    monkeypatch.setattr(logging.get_logger("fspad.trainer.training_arguments"), "warning", warned.append)
    args = make_arguments(tmp_path, bf16=True)
    assert (args.use_cpu, args.bf16) == (True, native == torch.bfloat16)
    assert bool(warned) == (native == torch.float32)


def test_weights_of_draft_steps(tmp_path):
    weights = make_arguments(tmp_path, num_draft_steps=3, draft_step_decay=0.5).draft_step_weights
    assert weights.tolist() == [1.0, 0.5, 0.25]


@pytest.mark.parametrize("what", ["all", "non_padding", "no"])
@pytest.mark.parametrize("has_features", [False, True])
def test_tokens_that_were_seen_are_counted(tmp_path, what, has_features):
    features = {"features_dir": str(tmp_path / "features")} if has_features else {}
    trainer = make_trainer(
        tmp_path, include_num_input_tokens_seen=what, train_sampling_strategy="sequential", max_steps=2, **features
    )
    trainer.train()
    lengths = trainer.train_dataset["length"][:]
    batches = lengths[:4], lengths[4:8]
    expected = {
        "all": sum(4 * max(batch) for batch in batches),
        "non_padding": sum(map(sum, batches)),
        "no": 0,
    }
    assert trainer.state.num_input_tokens_seen == expected[what]
    assert all(entry["tokens_per_second"] > 0 for entry in trainer.state.log_history if "loss" in entry)
