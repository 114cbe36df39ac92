"""A trainer that is given names makes head and tokenizer itself."""

import pytest
import torch
from datasets import Dataset

from fspad import FSPADModel
from fspad.provenance import vocabulary_hash
from fspad.trainer import FSPADTrainer, FSPADTrainingArguments, loading
from fspad.trainer.loading import load_target, make_head, trim_vocabulary
from helpers.dialogues import CHAT, make_tokenizer
from helpers.models import make_target
from helpers.trainers import make_dataset, make_trainer

QUICK = {"max_steps": 1, "report_to": "none", "use_cpu": True, "num_eval_prompts": 0, "per_device_train_batch_size": 4}


def test_a_target_by_name_is_all_that_is_needed(tmp_path, monkeypatch):
    make_target().save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    args = FSPADTrainingArguments(output_dir=str(tmp_path / "head"), draft_vocab_size=40, **QUICK)
    dataset = Dataset.from_list([{"messages": CHAT}] * 4)
    trainer = FSPADTrainer(target=str(tmp_path / "target"), args=args, train_dataset=dataset)
    trainer.train()
    trainer.save_model()
    config = FSPADModel.from_pretrained(tmp_path / "head").config
    assert (config.hidden_size, config.draft_vocab_size) == (32, 40)
    assert config.target_vocab_hash == vocabulary_hash(make_tokenizer())
    assert trainer.model.dtype == torch.float32
    monkeypatch.chdir(tmp_path)
    assert FSPADTrainer(target="target", train_dataset=dataset).args.output_dir == "fspad-head"


def test_a_target_without_a_tokenizer_takes_token_ids(tmp_path):
    make_target().save_pretrained(tmp_path / "target")
    args = FSPADTrainingArguments(output_dir=str(tmp_path / "head"), **QUICK)
    trainer = FSPADTrainer(target=str(tmp_path / "target"), args=args, train_dataset=make_dataset())
    assert trainer.model.config.target_vocab_hash is None
    with pytest.raises(ValueError, match="expected a tokenizer as `processing_class`"):
        FSPADTrainer(target=str(tmp_path / "target"), args=args, train_dataset=Dataset.from_list([{"messages": CHAT}]))


def test_no_target():
    with pytest.raises(ValueError, match="expected a target"):
        FSPADTrainer(train_dataset=make_dataset())


def test_new_heads_follow_from_the_seed():
    target = make_target()
    state = torch.get_rng_state()
    first, second, other = make_head(target, 1), make_head(target, 1), make_head(target, 2)
    assert torch.equal(torch.get_rng_state(), state)
    pairs = zip(first.parameters(), second.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not torch.equal(first.layer.mlp.down_proj.weight, other.layer.mlp.down_proj.weight)


def test_vocabulary_is_of_the_most_frequent_tokens(tmp_path):
    rows = [{"prompt_ids": [1], "response_ids": [5, 5, 5, 9, 9, 7]}]
    trainer = make_trainer(tmp_path, dataset=Dataset.from_list(rows), draft_vocab_size=2)
    assert trainer.model.draft_vocab_ids.tolist() == [5, 9]
    assert trim_vocabulary(trainer.model, trainer.train_dataset, None, 1) == pytest.approx(3 / 6)
    with pytest.raises(ValueError, match=r"expected a draft vocabulary of 1 .* to 97 tokens .* got 98"):
        make_trainer(tmp_path, draft_vocab_size=98)


def test_head_of_another_target_with_the_same_tokenizer(tmp_path, monkeypatch):
    from fspad import provenance

    warned = []
    monkeypatch.setattr(provenance.logger, "warning_once", warned.append)
    head = FSPADModel.from_target(make_target())
    make_trainer(tmp_path, make_target(), head=head).train()
    assert not warned
    make_trainer(tmp_path, make_target(seed=5), head=head)
    (message,) = warned
    assert "with other weights than this LlamaForCausalLM has" in message


def test_another_tokenizer_of_fitting_size(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(loading.logger, "warning", warned.append)
    make_target().save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    target = load_target(str(tmp_path / "target"))
    other = make_tokenizer()
    make_trainer(tmp_path / "head", target, processing_class=other)
    assert not warned
    other.add_tokens(["brand-new"])
    make_trainer(tmp_path / "head", target, processing_class=other)
    assert "has another vocabulary than the one of the target" in warned[0]


def test_token_ids_are_checked_in_all_rows(tmp_path):
    rows = [{"prompt_ids": [1, 2], "response_ids": [3, 4, 5]}] * 50
    rows += [{"prompt_ids": [1, 2], "response_ids": [3, 97, 5]}]
    with pytest.raises(ValueError, match=r"token ids below 97, .* got 97"):
        make_trainer(tmp_path, dataset=Dataset.from_list(rows))
    rows[-1] = {"prompt_ids": [1, 2], "response_ids": [3, -1, 5]}
    with pytest.raises(ValueError, match=r"token ids below 97, .* got -1"):
        make_trainer(tmp_path, dataset=make_dataset(), eval_dataset=Dataset.from_list(rows))


def test_output_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("no folder")
    args = FSPADTrainingArguments(output_dir=str(tmp_path / "file" / "head"), **QUICK)
    with pytest.raises(OSError, match=r"expected a folder that can be written to .*head \(Not a directory\)"):
        FSPADTrainer(target=make_target(), args=args, train_dataset=make_dataset())


def test_checkpoint_on_a_full_disk(tmp_path, monkeypatch):
    import safetensors

    def write(*args, **kwargs):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", write)
    with pytest.raises(
        OSError, match=r"No space left on device .* kept: make room, and give `resume_from_checkpoint`"
    ):
        trainer.train()
