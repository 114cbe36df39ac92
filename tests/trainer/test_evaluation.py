"""Speculative decoding during training: that it measures what `generate` does, and leaves the training as it is."""

import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset

from fspad import FSPADModel
from fspad.trainer import DataCollatorForFSPAD, FSPADTrainingArguments, evaluation
from fspad.trainer.data import prepare_dataset
from fspad.trainer.evaluation import (
    choose_draft_size,
    compare_draft_sizes,
    decode_prompts,
    find_prompts,
    first_prompts,
    usable_prompts,
)
from fspad.trainer.features import add_features
from helpers.models import make_head, make_target
from helpers.trainers import losses, make_dataset, make_trainer, weights

PROMPTS = [(1, 2, 3, 4), (5, 6), (7, 8, 0)]
DECODING = {"num_eval_prompts": 2, "eval_max_new_tokens": 16}


def make_dialogues():
    """Dialogues over nine tokens; the first prompt is there twice."""
    answers = [[1, 2, 3], [4, 5, 6, 7], [8, 1, 0, 2, 3], [4, 4, 4]]
    prompts = [PROMPTS[0], *PROMPTS]
    rows = [{"prompt_ids": list(p), "response_ids": a} for p, a in zip(prompts, answers, strict=True)]
    return Dataset.from_list(rows)


def make_pair(**options):
    """A target over few tokens, of which a random head guesses some, and such a head."""
    target = make_target(vocab_size=9)
    return target, make_head(target, **options)


def generated_tau(target, head, prompts, max_new_tokens=16):
    lengths = []
    for prompt in prompts:
        input_ids = torch.tensor([prompt])
        output = target.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            assistant_model=head,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        lengths.append(output.accept_lengths)
    return torch.cat(lengths).double().mean().item()


def state_of(*models):
    return [
        (set(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks), module.training)
        for model in models
        for module in model.modules()
    ]


def test_prompts_are_what_stands_before_the_first_answer():
    rows = [
        {"input_ids": [5, 6, 7, 8, 9, 1, 2], "assistant_mask": [0, 0, 1, 1, 0, 0, 1]},
        {"input_ids": [1, 2, 3], "assistant_mask": [0, 1, 1]},
        {"input_ids": [4, 4], "assistant_mask": [0, 0]},
    ]
    assert find_prompts(DataCollatorForFSPAD()(rows)) == [(5, 6), (1,)]


def test_prompts_of_packed_dialogues():
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "assistant_mask": [0, 0, 1, 0, 1], "position_ids": [0, 1, 2, 0, 1]},
        {"input_ids": [1, 2], "assistant_mask": [0, 1], "position_ids": [0, 1]},
    ]
    assert find_prompts(DataCollatorForFSPAD()(rows)) == [(5, 6), (8,), (1,)]


def test_prompts_are_the_first_of_the_dataset_however_it_is_shared(monkeypatch):
    batches = [[(1,), (2,)], [(1,), (3,)], [(4,), (2,)], [(5,), (6,)], [(7,)]]
    expected = [(1,), (2,), (3,), (4,), (5,)]
    assert first_prompts(batches, 5) == expected
    for num_processes in (2, 3):
        shares = [batches[process::num_processes] for process in range(num_processes)]
        monkeypatch.setattr(evaluation, "gather_object", lambda own, shares=shares: shares)
        assert first_prompts(shares[1], 5) == expected


def test_tau_is_that_of_generate(tmp_path):
    target, head = make_pair()
    trainer = make_trainer(
        tmp_path, target, head=head, dataset=make_dialogues(), eval_dataset=make_dialogues(), **DECODING
    )
    trainer.args.num_eval_prompts = 0
    assert not {"eval_tau", "eval_speedup"} & trainer.evaluate().keys()
    before = state_of(target, head)
    trainer.args.num_eval_prompts = 2
    metrics = trainer.evaluate()
    assert state_of(target, head) == before
    expected = generated_tau(target, head, PROMPTS[:2])
    assert expected > 1
    assert metrics["eval_tau"] == pytest.approx(expected)
    assert metrics["eval_speedup"] > 0
    assert trainer.state.log_history[-1]["eval_tau"] == metrics["eval_tau"]


@pytest.mark.parametrize("form", ["stream", "features", "packed", "dict"])
def test_every_form_of_dataset_has_prompts(tmp_path, form):
    target, head = make_pair()
    arguments = {"num_eval_prompts": 3, "eval_max_new_tokens": 12, "per_device_eval_batch_size": 1}
    dataset, names = make_dialogues(), ["eval_tau"]
    expected = [generated_tau(target, head, PROMPTS, 12)]
    if form == "stream":
        dataset = dataset.to_iterable_dataset()
    elif form == "features":
        dataset = add_features(prepare_dataset(dataset, None), target, tmp_path / "features")
    elif form == "packed":
        arguments |= {"packing": True, "max_length": 40}
    else:
        dataset, names = {"a": dataset, "b": dataset.select([2])}, ["eval_a_tau", "eval_b_tau"]
        expected.append(generated_tau(target, head, PROMPTS[1:2], 12))
    trainer = make_trainer(tmp_path, target, head=head, dataset=make_dialogues(), eval_dataset=dataset, **arguments)
    metrics = trainer.evaluate()
    assert [metrics[name] for name in names] == pytest.approx(expected)


def test_head_is_measured_as_it_will_be_used(tmp_path):
    """Trained in mixed precision on fp32 weights, loaded in the dtype of its bf16 target."""
    target, head = make_pair()
    target = target.bfloat16()
    arguments = {"bf16": True, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(
        tmp_path, target, head=head, dataset=make_dialogues(), eval_dataset=make_dialogues(), **arguments, **DECODING
    )
    trainer.train()
    measured = [entry["eval_tau"] for entry in trainer.state.log_history if "eval_tau" in entry]
    assert len(measured) == 2
    assert trainer.model.dtype == torch.float32
    for step, tau in zip((2, 4), measured, strict=True):
        used = FSPADModel.from_pretrained(tmp_path / f"checkpoint-{step}", dtype=torch.bfloat16)
        assert tau == pytest.approx(generated_tau(target, used, PROMPTS[:2]))


def test_adapter_of_a_head_is_measured(tmp_path):
    from helpers.lora import adapt

    target, base = make_pair()
    head = adapt(copy.deepcopy(base), lora_alpha=64)
    prompts, arguments = PROMPTS[:1], {"num_eval_prompts": 1, "eval_max_new_tokens": 40}
    trainer = make_trainer(
        tmp_path, target, head=head, dataset=make_dialogues(), eval_dataset=make_dialogues(), **arguments
    )
    tau = trainer.evaluate()["eval_tau"]
    assert tau == pytest.approx(generated_tau(target, head.eval(), prompts, 40))
    assert tau != pytest.approx(generated_tau(target, base, prompts, 40))


def test_evaluation_changes_nothing_of_the_training(tmp_path):
    runs = []
    for strategy in ("no", "steps"):
        target, head = make_pair()
        trainer = make_trainer(
            tmp_path, target, head=head, dataset=make_dialogues(), eval_dataset=make_dialogues(), seed=3,
            eval_strategy=strategy, eval_steps=1, per_device_train_batch_size=2, **DECODING,
        )  # fmt: skip
        trainer.train()
        assert sum("eval_tau" in entry for entry in trainer.state.log_history) == (4 if strategy == "steps" else 0)
        runs.append((losses(trainer), weights(trainer), torch.rand(3), np.random.rand(3), random.random()))
    assert runs[0][0] == runs[1][0]
    for name, tensor in runs[0][1].items():
        assert torch.equal(tensor, runs[1][1][name])
    for one, other in zip(runs[0][2:], runs[1][2:], strict=True):
        assert np.array_equal(one, other)


def test_best_checkpoint_by_tau(tmp_path, monkeypatch):
    taus = iter([1.5, 2.5, 2.0, 1.0])
    monkeypatch.setattr(evaluation, "decode_prompts", lambda *args: {"tau": next(taus), "speedup": 1.0})
    trainer = make_trainer(
        tmp_path,
        dataset=make_dataset(),
        eval_dataset=make_dataset(4),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="tau",
        **DECODING,
    )
    trainer.train()
    assert trainer.state.best_metric == 2.5
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = FSPADModel.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    assert all(torch.equal(tensor, best[name]) for name, tensor in weights(trainer).items())


def test_processes_share_the_prompts_out(monkeypatch):
    target, head = make_pair()
    gathered = []
    monkeypatch.setattr(evaluation, "gather_object", lambda own: gathered.extend(own) or gathered)
    for process in range(3):
        state = SimpleNamespace(process_index=process, num_processes=3)
        monkeypatch.setattr(evaluation, "PartialState", lambda state=state: state)
        metrics = decode_prompts(head, target, PROMPTS[:2], 12, {})
    # The last process has no prompt of its own, and knows of all.
    assert len(gathered) == 2
    assert metrics["tau"] == pytest.approx(generated_tau(target, head, PROMPTS[:2], 12))


def test_target_that_cannot_be_assisted():
    config = transformers.MambaConfig(vocab_size=9, hidden_size=32, num_hidden_layers=2, state_size=4)
    target = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert decode_prompts(make_head(target), target, PROMPTS[:1], 6, {})["tau"] == 1.0


def test_prompts_that_leave_no_room_for_an_answer():
    target = make_target("gpt2", vocab_size=9, n_positions=16)
    prompts = [(1,) * 11, (2, 3)]
    assert usable_prompts(prompts, target, 6) == [(2, 3)]
    assert usable_prompts(prompts[:1], target, 6) == []
    assert usable_prompts(prompts, make_target(vocab_size=9), 6) == prompts


def test_plain_answers_are_decoded_once():
    target, head = make_pair()
    kept = {}
    first = decode_prompts(head, target, PROMPTS[:2], 12, kept)
    assert list(kept) == PROMPTS[:2]
    answers = dict(kept)
    second = decode_prompts(head, target, PROMPTS, 12, kept)
    assert list(kept) == PROMPTS
    assert all(kept[prompt] is answer for prompt, answer in answers.items())
    assert first["tau"] == pytest.approx(generated_tau(target, head, PROMPTS[:2], 12))
    assert second["tau"] == pytest.approx(generated_tau(target, head, PROMPTS, 12))


def test_acceptance_by_depth_adds_up_to_tau():
    target, head = make_pair()
    metrics = decode_prompts(head, target, PROMPTS[:1], 25, {})
    shares = [value for name, value in metrics.items() if name.startswith("acceptance_depth_")]
    assert metrics["tau"] > 1
    assert sum(shares) == pytest.approx(metrics["tau"] - 1)


@pytest.mark.parametrize(
    ("speedups", "chosen"),
    [
        ({"auto": 1.5, 4: 1.2, 8: 1.55}, "auto"),  # not clearly faster
        ({"auto": 1.0, 4: 1.2, 8: 1.25}, 8),
        ({"auto": 0.9, 4: 0.5}, "auto"),
    ],
)
def test_fixed_draft_size_must_be_clearly_faster(speedups, chosen):
    assert choose_draft_size(speedups) == chosen


@pytest.mark.parametrize("has_eval_dataset", [False, True])
def test_draft_size_is_measured_after_training(tmp_path, monkeypatch, has_eval_dataset):
    seen = []

    def compare(head, target, prompts, max_new_tokens):
        seen.append((prompts, max_new_tokens))
        return {"auto": 0.8, 16: 0.9}

    monkeypatch.setattr(evaluation, "compare_draft_sizes", compare)
    warned = []
    monkeypatch.setattr(evaluation.logger, "warning", warned.append)
    target, head = make_pair()
    eval_dataset = make_dialogues().select([3]) if has_eval_dataset else None
    trainer = make_trainer(
        tmp_path, target, make_dialogues(), head, eval_dataset, num_draft_tokens="measure", max_steps=1, **DECODING
    )
    trainer.train()
    assert seen == [([PROMPTS[2]] if has_eval_dataset else PROMPTS[:2], DECODING["eval_max_new_tokens"])]
    assert trainer.model.config.num_draft_tokens == 16
    trainer.save_model()
    assert FSPADModel.from_pretrained(tmp_path).config.num_draft_tokens == 16
    assert "slower on this machine: 0.90 times" in warned[-1]


def test_draft_sizes_are_compared_in_turn():
    target, head = make_pair()
    speedups = compare_draft_sizes(head, target, PROMPTS[:2], 6)
    assert set(speedups) == {"auto", *evaluation.DRAFT_SIZES}
    assert all(value > 0 for value in speedups.values())
    assert head.config.num_draft_tokens == 59


@pytest.mark.parametrize(("value", "expected"), [("12", 12), ("auto", "auto"), ("measure", 5), (None, 5)])
def test_draft_size_of_the_arguments(tmp_path, value, expected):
    target, head = make_pair(num_draft_tokens=5)
    make_trainer(tmp_path, target, head=head, dataset=make_dialogues(), num_draft_tokens=value)
    assert head.config.num_draft_tokens == expected


@pytest.mark.parametrize(("name", "value"), [("num_eval_prompts", -1), ("eval_max_new_tokens", 0)])
def test_impossible_arguments(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"expected {name} of at least {value + 1}, got {value}"):
        FSPADTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{name: value})
