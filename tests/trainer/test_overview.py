"""What is told before the first step, and that telling it changes nothing."""

import pytest
import torch
from datasets import Dataset

from fspad import FSPADConfig
from fspad.trainer import overview
from fspad.trainer.overview import Trial, describe, try_batch
from helpers.models import make_target
from helpers.trainers import losses, make_dataset, make_trainer, weights


def test_trial_changes_nothing(tmp_path):
    trainer = make_trainer(tmp_path)
    before, state = weights(trainer), torch.get_rng_state()
    trial = try_batch(trainer)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in trainer.model.parameters())
    # Rows from all over the dataset
    assert trial.tokens == sum(trainer.train_dataset[row]["length"] for row in (0, 4, 8, 12))
    assert min(trial.feature_seconds, trial.step_seconds) > 0
    trainer.train()
    untold = make_trainer(tmp_path)
    untold.train_dataset, dataset = None, untold.train_dataset  # so that nothing is tried
    untold.train_dataset = dataset
    untold.train()
    assert losses(untold) == losses(trainer)


def test_overview(tmp_path):
    trainer = make_trainer(
        tmp_path, num_train_epochs=3, max_steps=-1, gradient_accumulation_steps=2, draft_vocab_size=40
    )
    text = describe(trainer, Trial(tokens=100, feature_seconds=1.5, step_seconds=0.5))
    tokens = sum(trainer.train_dataset["length"][:])
    assert "head for LlamaForCausalLM, which scores 40 of 97 tokens (" in text
    assert f"on 16 rows of {tokens} tokens: 3 epochs, with batches of 8 rows" in text
    assert f"At 50 tokens/s (measured on one batch) an epoch takes about {tokens / 50:.0f} seconds" in text
    assert "Features" not in text
    assert "Memory: about" in text


def test_overview_of_features_on_disk(tmp_path):
    trainer = make_trainer(tmp_path, features_dir=str(tmp_path / "features"))
    tokens = sum(trainer.train_dataset["length"][:])
    text = describe(trainer, Trial(tokens=100, feature_seconds=5.0, step_seconds=0.5))
    assert f"all take about {tokens * 5 / 100:.0f} seconds and 0 MB in" in text
    assert "At 200 tokens/s" in text


def test_overview_of_a_stream(tmp_path):
    trainer = make_trainer(tmp_path, dataset=make_dataset().to_iterable_dataset(), max_steps=7)
    text = describe(trainer, try_batch(trainer))
    assert "on a stream: 7 steps" in text
    assert "a million tokens take about" in text


@pytest.mark.parametrize(
    ("vocab_size", "draft_vocab_size", "hidden_size", "weights", "expected"),
    [
        (262_144, None, 640, 8_000_000, "Scoring 262,144 tokens makes a step 10 times as much work as 16,384"),
        (262_144, 16_384, 640, 8_000_000, None),
        (32_000, None, 4096, 300_000_000, None),
    ],
)
def test_large_vocabularies_are_worth_a_word(vocab_size, draft_vocab_size, hidden_size, weights, expected):
    config = FSPADConfig(vocab_size=vocab_size, draft_vocab_size=draft_vocab_size, hidden_size=hidden_size)
    hint = overview._vocabulary_hint(config, weights)
    assert hint is None if expected is None else hint.startswith(expected)


def test_it_is_told_before_the_first_step_and_only_if_wanted(tmp_path, capsys):
    make_trainer(tmp_path, max_steps=1, disable_tqdm=False).train()
    assert capsys.readouterr().out.startswith("Training 0.0 million weights of a head")
    make_trainer(tmp_path, max_steps=1).train()
    assert "Training" not in capsys.readouterr().out


@pytest.mark.parametrize("features_dir", [None, "features"])
def test_what_is_wrong_is_said_before_features_are_computed(tmp_path, features_dir):
    target = make_target()
    with torch.no_grad():
        target.model.norm.weight[3] = torch.nan
    folder = features_dir and str(tmp_path / features_dir)
    trainer = make_trainer(tmp_path, target, features_dir=folder)
    with pytest.raises(ValueError, match="expected finite features from LlamaForCausalLM"):
        trainer.train()
    rows = Dataset.from_list([{"prompt_ids": [1, 2], "response_ids": [3, 97, 5]}])
    with pytest.raises(ValueError, match="token ids below 97"):
        make_trainer(tmp_path, dataset=rows, features_dir=folder)
    assert not (tmp_path / "features").exists()
