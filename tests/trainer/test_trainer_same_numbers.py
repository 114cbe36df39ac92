"""The numbers of a training are the same however it is run."""

import pytest
import torch

from fspad import FSPADModel
from fspad.trainer import DataCollatorForFSPAD, training_arguments
from fspad.trainer.data import prepare_dataset
from fspad.trainer.loss import LossSums
from helpers.models import make_target
from helpers.trainers import losses, make_dataset, make_trainer, weights


def assert_same_sums(one, other, tolerance):
    assert one.terms.keys() == other.terms.keys()
    for name in one.terms:
        torch.testing.assert_close(one.terms[name], other.terms[name], rtol=tolerance, atol=tolerance)
    for name in ("rows", "correct", "in_top_k"):
        assert torch.equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize(
    ("draft_vocab_size", "num_draft_steps", "bf16"),
    [(None, 1, False), (40, 1, False), (None, 2, False), (40, 2, True)],
)
def test_gradient_accumulation_changes_nothing(tmp_path, draft_vocab_size, num_draft_steps, bf16):
    results = []
    for batch_size, accumulation in ((8, 1), (1, 8)):
        torch.manual_seed(1)
        target = make_target()
        head = FSPADModel.from_target(target)
        if draft_vocab_size:
            head.set_draft_vocabulary(torch.randperm(97, generator=torch.Generator().manual_seed(0))[:40])
        trainer = make_trainer(
            tmp_path,
            target,
            head=head,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            num_draft_steps=num_draft_steps,
            feature_noise=0.0,
            train_sampling_strategy="sequential",
            optim="sgd",
            learning_rate=0.1,
            bf16=bf16,
        )
        trainer.train()
        results.append((losses(trainer), weights(trainer)))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        assert one == pytest.approx(other, abs=2e-3 if bf16 else 2e-6)
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(tensor, results[1][1][name], atol=1e-4 if bf16 else 1e-6, rtol=0)


def test_half_precision_is_of_the_computation_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(training_arguments, "native_dtype", lambda device: torch.bfloat16)
    results = {}
    for bf16 in (False, True):
        trainer = make_trainer(
            tmp_path, bf16=bf16, max_steps=12, learning_rate=1e-2, num_draft_steps=2, feature_noise=0.0
        )
        dtypes = []
        trainer.model.layer.mlp.down_proj.register_forward_hook(
            lambda *args, dtypes=dtypes: dtypes.append(args[-1].dtype)
        )
        trainer.train()
        assert set(dtypes) == {torch.bfloat16 if bf16 else torch.float32}
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
        results[bf16] = [loss for loss, *_ in losses(trainer)]
    assert results[True][-1] < 0.95 * results[True][0]
    assert results[True] == pytest.approx(results[False], rel=5e-3)
    assert results[True] != results[False]


@pytest.mark.parametrize("num_draft_steps", [1, 3])
def test_gradient_checkpointing_changes_nothing(tmp_path, num_draft_steps):
    results = []
    for is_on in (False, True):
        trainer = make_trainer(tmp_path, gradient_checkpointing=is_on, num_draft_steps=num_draft_steps)
        trainer.train()
        assert trainer.model.layer.mlp.gradient_checkpointing is is_on
        results.append((losses(trainer), weights(trainer)))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        assert one == pytest.approx(other, abs=1e-6)
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(tensor, results[1][1][name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_draft_steps", [1, 3])
def test_packing_changes_nothing(tmp_path, num_draft_steps):
    arguments = {"num_draft_steps": num_draft_steps, "feature_noise": 0.0, "max_steps": 2, "optim": "sgd"}
    arguments |= {"per_device_train_batch_size": 16, "learning_rate": 0.1, "train_sampling_strategy": "sequential"}
    alone = make_trainer(tmp_path, **arguments)
    packed = make_trainer(tmp_path, packing=True, max_length=60, **arguments)
    assert len(packed.train_dataset) < len(alone.train_dataset)
    for trainer in (alone, packed):
        trainer.train()
    for one, other in zip(losses(alone), losses(packed), strict=True):
        assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize("num_draft_steps", [1, 2])
def test_packed_rows_have_the_sums_of_their_dialogues(tmp_path, num_draft_steps):
    trainer = make_trainer(tmp_path, num_draft_steps=num_draft_steps, feature_noise=0.0)

    def sums(dataset):
        batch = trainer.data_collator(list(dataset))
        return trainer.compute_loss(trainer.model.train(), batch, return_outputs=True)[1]["sums"]

    packed = prepare_dataset(trainer.train_dataset, None, max_length=60, packing=True)
    assert len(packed) < len(trainer.train_dataset) / 2
    assert len(sums(packed).rows) == num_draft_steps
    assert_same_sums(sums(packed), sums(trainer.train_dataset), 1e-5)


def test_resumed_training_is_the_same_training(tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 2, "seed": 3, "gradient_accumulation_steps": 2}
    arguments["num_draft_steps"] = 2
    whole = make_trainer(tmp_path / "whole", **arguments)
    whole.train()
    make_trainer(tmp_path / "parts", **arguments).train()
    # Another head to begin with: everything must come from the checkpoint.
    torch.manual_seed(9)
    head = FSPADModel.from_target(make_target())
    resumed = make_trainer(tmp_path / "parts", head=head, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name])


def test_evaluation_is_by_rows_not_by_batches(tmp_path):
    metrics = []
    for batch_size in (1, 16):
        trainer = make_trainer(tmp_path, eval_dataset=make_dataset(), per_device_eval_batch_size=batch_size)
        metrics.append(trainer.evaluate())
    for name in ("eval_loss", "eval_feature_loss", "eval_logits_loss", "eval_accuracy"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-5)
    parts = metrics[0]["eval_feature_loss"] + 0.1 * metrics[0]["eval_logits_loss"]
    assert metrics[0]["eval_loss"] == pytest.approx(parts, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "mixtral"])
def test_padding_changes_nothing(tmp_path, family):
    target = make_target(family)
    trainer = make_trainer(tmp_path, target)
    rows = list(prepare_dataset(make_dataset(3), None))
    trainer.model.eval()

    def sums(rows):
        with torch.no_grad():
            batch = DataCollatorForFSPAD(pad_token_id=96)(rows)
            return trainer.compute_loss(trainer.model, batch, return_outputs=True)[1]["sums"]

    alone = LossSums()
    for row in rows:
        alone.add(sums([row]))
    assert_same_sums(sums(rows), alone, 1e-4)


def test_streams_are_trained_for_a_number_of_steps(tmp_path):
    arguments = {"feature_noise": 0.0, "train_sampling_strategy": "sequential", "num_draft_steps": 2}
    whole = make_trainer(tmp_path, **arguments)
    whole.train()
    # Of the steps that are asked for, the stream has one at a time: it is begun anew.
    for rows, steps in ((16, 4), (8, 2)):
        stream = make_dataset(rows).to_iterable_dataset()
        streamed = make_trainer(tmp_path, dataset=stream, eval_dataset=stream, **arguments)
        assert streamed.evaluate()["eval_loss"] > 0
        streamed.train()
        assert streamed.state.global_step == 4
        assert losses(streamed)[:steps] == losses(whole)[:steps]
    with pytest.raises(ValueError, match="expected max_steps with a stream"):
        make_trainer(tmp_path, dataset=stream, max_steps=-1)
