"""Training of a head on tiny targets: what is learned, logged, saved and refused."""

import copy
import json

import pytest
import torch
from datasets import Dataset

from fspad import FSPADConfig, FSPADModel
from fspad.bench.machine import target_dtype
from fspad.trainer import PAPER, DataCollatorForFSPAD, FSPADTrainer, FSPADTrainingArguments
from fspad.trainer.data import prepare_dataset
from helpers.dialogues import MARKERS, make_tokenizer
from helpers.models import make_target
from helpers.trainers import losses, make_dataset, make_trainer, weights


def test_preset_is_the_papers(tmp_path):
    args = FSPADTrainingArguments(output_dir=str(tmp_path), **PAPER)
    assert (args.learning_rate, args.adam_beta1, args.adam_beta2) == (5e-5, 0.9, 0.95)
    assert (args.warmup_steps, args.num_train_epochs, args.max_length) == (2000, 20, 2048)
    assert (args.max_grad_value, args.max_grad_norm, args.lr_scheduler_type) == (0.5, 0.0, "linear")
    assert (args.feature_loss_weight, args.logits_loss_weight, args.feature_noise) == (1.0, 0.1, 0.2)


def test_target_stays_as_it_is(tmp_path):
    target = make_target()
    target.train()
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in target.named_parameters()}
    trainer = make_trainer(tmp_path, target)
    head_before = weights(trainer)
    trainer.train()
    assert not target.training
    for name, parameter in target.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None
    assert not target.get_output_embeddings()._forward_pre_hooks
    assert all(not torch.equal(tensor, head_before[name]) for name, tensor in weights(trainer).items())


@pytest.mark.parametrize("num_draft_steps", [1, 3])
def test_log_lines_add_up_to_the_loss(tmp_path, num_draft_steps):
    trainer = make_trainer(tmp_path, num_draft_steps=num_draft_steps)
    trainer.train()
    assert len(losses(trainer)) == 4
    for loss, part_features, part_logits, accuracy in losses(trainer):
        assert loss == pytest.approx(part_features + 0.1 * part_logits, rel=1e-5)
        assert 0 <= accuracy <= 1


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_further_draft_steps_do_not_dilute_the_first(tmp_path, decay):
    trainer = make_trainer(tmp_path, num_draft_steps=3, draft_step_decay=decay, feature_noise=0.0)
    (row, *_) = prepare_dataset(Dataset.from_list([{"prompt_ids": [1, 2, 3], "response_ids": [4, 5, 6, 7]}]), None)
    loss, outputs = trainer.compute_loss(trainer.model.train(), DataCollatorForFSPAD()([row]), return_outputs=True)
    sums = outputs["sums"]
    # Four tokens of the assistant: three rows, of which two begin a chain of two steps, and one begins one of three.
    assert sums.rows.tolist() == [3, 2, 1]
    steps = sums.terms["feature_loss"] + 0.1 * sums.terms["logits_loss"]
    assert loss.item() == pytest.approx((steps * torch.tensor([1, decay, decay**2])).sum().item() / 3)


def test_evaluation_tells_the_accuracy_of_every_depth(tmp_path):
    head = FSPADModel.from_target(target := make_target(), FSPADConfig.from_target(target.config, draft_depth=2))
    trainer = make_trainer(tmp_path, target, head=head, eval_dataset=make_dataset())
    metrics = trainer.evaluate()
    names = [name for name in metrics if "accuracy" in name]
    assert names == ["eval_accuracy", "eval_accuracy_depth_2", "eval_accuracy_depth_3", "eval_accuracy_top_8"]
    parts = metrics["eval_feature_loss"] + 0.1 * metrics["eval_logits_loss"]
    assert metrics["eval_loss"] == pytest.approx(parts, rel=1e-5)
    # One draft step is trained: the loss is that of the first, whatever else is looked at.
    shallow = make_trainer(tmp_path, target, head=copy.deepcopy(head), eval_dataset=make_dataset())
    shallow.model.config.draft_depth = 0
    assert shallow.evaluate()["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)


@pytest.mark.parametrize(("num_draft_steps", "n_gpu", "message"), [(0, 0, "at least 1, got 0"), (2, 2, "torchrun")])
def test_impossible_numbers_of_draft_steps(tmp_path, monkeypatch, num_draft_steps, n_gpu, message):
    monkeypatch.setattr(FSPADTrainingArguments, "n_gpu", n_gpu)
    with pytest.raises(ValueError, match=message):
        FSPADTrainingArguments(output_dir=str(tmp_path), use_cpu=True, num_draft_steps=num_draft_steps)


def test_noise_of_packed_dialogues_follows_their_own_lengths(tmp_path):
    rows = [{"prompt_ids": [1, 2], "response_ids": [3] * 6}, {"prompt_ids": [4] * 10, "response_ids": [5] * 30}]
    trainer = make_trainer(tmp_path, dataset=Dataset.from_list(rows), packing=True, max_length=48)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape == (1, 48)
    clean, noisy = (trainer.make_rows(batch, is_training=training) for training in (False, True))
    noise = (noisy.features - clean.features).abs().amax(dim=-1)[0]
    length = torch.where(batch["input_ids"][0, :-2] < 4, 8, 40)
    bound = 0.5 * 0.2 * 512 / length
    assert (noise <= bound).all()
    assert (noise > 0.5 * bound).all()


def test_noise_is_in_training_only_and_on_the_input_only(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=make_dataset())
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]
    batch = next(iter(trainer.get_train_dataloader()))
    clean, noisy = (trainer.make_rows(batch, is_training=training) for training in (False, True))
    assert torch.equal(clean.label_features, noisy.label_features)
    noise = (noisy.features - clean.features).abs().amax(dim=(1, 2))
    bound = 0.5 * 0.2 * 512 / batch["attention_mask"].sum(dim=1)
    assert (noise <= bound).all()
    assert (noise > 0.8 * bound).all()


def test_several_evaluation_datasets(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset={"a": make_dataset(4), "b": make_dataset(4, seed=1)})
    metrics = trainer.evaluate()
    assert metrics["eval_a_logits_loss"] != metrics["eval_b_logits_loss"]
    assert {"eval_a_accuracy", "eval_b_accuracy", "eval_a_loss", "eval_b_loss"} <= metrics.keys()


@pytest.mark.parametrize("in_column", [False, True])
def test_features_that_are_not_finite_stop_the_training(tmp_path, in_column):
    target = make_target()
    rows = make_dataset().map(lambda row, i: {"prompt_ids": [96 if i == 3 else 1, 2]}, with_indices=True)
    rows = rows.map(lambda row: {"response_ids": [token % 96 for token in row["response_ids"]]})
    dataset = prepare_dataset(rows, None)
    if in_column:
        features = [torch.randn(length, 32) for length in dataset["length"]]
        features[3][-2, 5] = torch.inf
        dataset = dataset.add_column("features", [rows.tolist() for rows in features])
    else:
        with torch.no_grad():
            target.model.embed_tokens.weight[96] = torch.nan
    trainer = make_trainer(tmp_path, target, dataset, train_sampling_strategy="sequential")
    before = weights(trainer)
    ids = dataset[3]["input_ids"]
    message = rf"from LlamaForCausalLM in float32, got NaN or infinity at .* row of {len(ids)} tokens .*\[{ids[0]}, "
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())
    if not in_column:
        with pytest.raises(ValueError, match="expected finite features"):
            trainer.evaluate(trainer.train_dataset)


def test_token_ids_of_another_tokenizer(tmp_path):
    dataset = Dataset.from_list([{"prompt_ids": [1, 2], "response_ids": [3, 97, 5]}])
    with pytest.raises(ValueError, match="token ids below 97, the target's vocabulary size, got 97"):
        make_trainer(tmp_path, dataset=dataset).train()


def test_saved_folder_is_the_head_alone(tmp_path):
    tokenizer = make_tokenizer(MARKERS)
    messages = [{"role": "user", "content": "hello you"}, {"role": "assistant", "content": "hi bye now"}]
    dataset = Dataset.from_list([{"messages": messages}] * 4)
    trainer = make_trainer(tmp_path, dataset=dataset, processing_class=tokenizer, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    assert FSPADModel.from_pretrained(tmp_path).config.pad_token_id is None, "special tokens stay the target's"
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        names = {path.name for path in folder.iterdir()}
        assert {"config.json", "model.safetensors", "modeling_fspad.py", "configuration_fspad.py"} <= names
        assert not [name for name in names if "token" in name or "chat_template" in name]
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModel"].startswith("modeling_fspad.")
    written = json.loads((tmp_path / "config.json").read_text())
    assert written.keys() <= FSPADConfig().to_dict().keys() | {"auto_map"}, "what loading would warn of"
    loaded = FSPADModel.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == weights(trainer).keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in weights(trainer).items())


def test_resuming_with_another_head_is_refused(tmp_path):
    target = make_target()
    make_trainer(tmp_path, target, save_strategy="steps", save_steps=2).train()
    config = FSPADConfig.from_target(target.config, draft_vocab_size=40)
    other = make_trainer(tmp_path, target, head=FSPADModel.from_target(target, config))
    with pytest.raises(ValueError, match=r"expected a head with draft_vocab_size=None, .* got draft_vocab_size=40"):
        other.train(resume_from_checkpoint=True)


def test_scaled_gradients_are_unscaled_before_they_are_clipped():
    from fspad.trainer.clipping import ClipGradientValues

    class Accelerator:
        def unscale_gradients(self):
            model.weight.grad /= 65536

    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.grad = torch.full((1, 1), 0.25 * 65536)
    args = FSPADTrainingArguments(output_dir="unused", use_cpu=True, report_to="none")
    ClipGradientValues(Accelerator()).on_pre_optimizer_step(args, None, None, model=model)
    assert model.weight.grad.item() == 0.25


def test_gradients_are_clipped_by_value(tmp_path):
    largest = []

    class Watch(FSPADTrainer):
        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            optimizer.register_step_pre_hook(
                lambda opt, *_: largest.append(
                    max(p.grad.abs().max().item() for group in opt.param_groups for p in group["params"])
                )
            )
            return optimizer

    trainer = make_trainer(tmp_path, max_grad_value=1e-3, max_steps=1)
    trainer.__class__ = Watch
    trainer.train()
    assert largest == [pytest.approx(1e-3)]


def test_head_of_another_target(tmp_path):
    head = FSPADModel.from_target(make_target(hidden_size=64))
    with pytest.raises(ValueError, match=r"hidden_size=64.*hidden_size=32"):
        make_trainer(tmp_path, head=head)


def test_target_by_path(tmp_path):
    target = make_target().bfloat16()
    target.save_pretrained(tmp_path / "target")
    head = FSPADModel.from_target(target).float()
    trainer = make_trainer(tmp_path / "head", str(tmp_path / "target"), head=head, bf16=True)
    assert trainer.target.dtype == target_dtype(torch.device("cpu"))
    trainer.train()
    assert len(losses(trainer)) == 4


def test_trained_head_drafts_what_the_target_writes(tmp_path):
    """The whole chain: an error in the alignment would train just as well and have every draft refused."""
    target = make_target()
    torch.manual_seed(5)
    prompts = torch.randint(97, (12, 4))
    answers = target.generate(prompts, max_new_tokens=24, do_sample=False)[:, 4:]
    rows = [{"prompt_ids": p, "response_ids": a} for p, a in zip(prompts.tolist(), answers.tolist(), strict=True)]
    dataset = Dataset.from_list(rows)
    trainer = make_trainer(
        tmp_path,
        target,
        dataset,
        eval_dataset=dataset,
        max_steps=150,
        learning_rate=1e-2,
        per_device_train_batch_size=12,
        feature_noise=0.0,
        logits_loss_weight=1.0,
        num_eval_prompts=2,
        eval_max_new_tokens=24,
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert 0.9 < metrics["eval_accuracy"] <= metrics["eval_accuracy_top_8"] <= 1
    assert metrics["eval_tau"] > 2.5
    out = target.generate(
        prompts[:1],
        assistant_model=trainer.model.eval(),
        max_new_tokens=24,
        do_sample=False,
        num_assistant_tokens=16,
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences[:, 4:], answers[:1])
    assert out.accept_lengths.float().mean() > 2.5
