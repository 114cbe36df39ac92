"""What a card tells of a training: what the trainer knows, and nothing that it does not."""

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard

import fspad
from fspad import FSPADConfig, FSPADModel
from fspad.hub_cards import Training
from fspad.trainer.cards import describe_training, hub_datasets, make_card
from helpers.models import make_target
from helpers.trainers import make_dataset, make_trainer

TARGET, SHA = "somebody/target", "89abcdef0123456789abcdef0123456789abcdef"
# Two dialogues with 3 and 5 tokens of the assistant: the first of each is given when drafting begins.
ROWS = Dataset.from_list(
    [{"prompt_ids": [1, 2, 3], "response_ids": [4, 5, 6]}, {"prompt_ids": [1, 2], "response_ids": [4, 5, 6, 7, 8]}]
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    target = make_target()
    target.config._name_or_path, target.config._commit_hash = TARGET, SHA
    config = FSPADConfig.from_target(target.config, draft_depth=1)
    trainer = make_trainer(
        tmp_path_factory.mktemp("head"),
        target,
        ROWS,
        FSPADModel.from_target(target, config),
        eval_dataset=make_dataset(2),
        eval_strategy="steps",
        eval_steps=1,
        max_steps=2,
        gradient_accumulation_steps=2,
        feature_noise=0.0,
    )
    trainer.train()
    return trainer


def test_training_of_a_trainer(trained):
    training = describe_training(trained, dataset="answers of the target")
    assert training.dataset == "answers of the target"
    assert (training.num_dialogs, training.num_answer_tokens) == (2, 2 + 4)
    assert (training.steps, training.epochs, training.saved_step) == (2, 2.0, None)
    assert training.target_dtype == "float32"
    assert training.versions["torch"] == torch.__version__
    assert training.versions["fspad"] == fspad.__version__
    assert "core" in training.hardware
    expected = {"learning_rate": 1e-3, "lr_scheduler_type": "linear", "train_batch_size": 8, "feature_noise": 0.0}
    assert training.recipe.items() >= {**expected, "max_grad_value": 0.5, "num_draft_steps": 1}.items()
    # What is off is no hyperparameter.
    assert not {"bf16", "packing", "max_grad_norm"} & training.recipe.keys()
    assert [evaluation.step for evaluation in training.evaluations] == [1, 2]
    logged = [entry for entry in trained.state.log_history if "eval_accuracy" in entry]
    assert [len(evaluation.accuracies) for evaluation in training.evaluations] == [2, 2]
    assert training.evaluations[1].accuracies[1] == logged[1]["eval_accuracy_depth_2"]


def test_packed_rows_are_counted_by_their_dialogues(tmp_path):
    trainer = make_trainer(tmp_path, dataset=ROWS, packing=True, max_length=20, max_steps=1)
    assert len(trainer.train_dataset) == 1
    trainer.train()
    training = describe_training(trainer)
    assert (training.num_dialogs, training.num_answer_tokens) == (2, 2 + 4)
    assert training.recipe["packing"] is True


def test_a_stream_is_not_counted(tmp_path):
    trainer = make_trainer(tmp_path, dataset=ROWS.to_iterable_dataset(), max_steps=1)
    trainer.train()
    training = describe_training(trainer)
    assert (training.num_dialogs, training.num_answer_tokens, training.steps) == (None, None, 1)


def test_a_trainer_that_did_nothing_tells_nothing(tmp_path):
    assert describe_training(make_trainer(tmp_path), dataset="answers of the target") == Training(evaluations=[])


def test_the_best_checkpoint_is_named(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, load_best_model_at_end=True, eval_dataset=make_dataset(2))
    trainer.state.global_step, trainer.state.best_global_step = 30, 20
    facts = dict(describe_training(trainer).facts())
    assert (facts["Optimizer steps"], facts["Weights kept"]) == ("30", "those of step 20")


def test_card_of_a_trainer(trained, tmp_path):
    trained.args.output_dir = str(tmp_path)
    trained.create_model_card(license="mit", dataset="answers\nof the target", tags=["small"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == TARGET
    assert (card.data.license, card.data.tags[-1]) == ("mit", "small")
    assert card.data.eval_results is None, "what was logged in training is no benchmark"
    assert f"- Target: [{TARGET}](https://huggingface.co/{TARGET}), revision `{SHA}`" in card.text
    section = card.text.split("## Training\n")[1].split("\n## ")[0]
    assert "- Data: answers of the target\n- Dialogues: 2\n- Answer tokens: 6\n- Optimizer steps: 2\n" in section
    assert "`learning_rate=0.001`" in section
    assert "| 2 | " in section
    assert "![What the trainer measured, over the optimizer steps](training.png)" in section
    assert (tmp_path / "training.png").is_file()
    assert str(tmp_path) not in card.text
    assert "This model is a fine-tuned version" not in card.text


def test_revision_is_that_of_the_target_that_the_card_names(trained):
    assert make_card(trained).target_revision == SHA
    assert make_card(trained, target="somebody/other").target_revision is None
    assert make_card(trained, target_revision="v1").target_revision == "v1"


def test_only_the_first_process_writes(trained, tmp_path, monkeypatch):
    trained.args.output_dir = str(tmp_path)
    monkeypatch.setattr(trained, "is_world_process_zero", lambda: False)
    trained.create_model_card()
    assert not list(tmp_path.iterdir())


def test_an_adapter_keeps_the_card_of_peft(tmp_path):
    from peft import LoraConfig

    from helpers.trainers import FSPADTrainer, FSPADTrainingArguments

    target = make_target()
    args = FSPADTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    lora = LoraConfig(target_modules="all-linear")
    FSPADTrainer(FSPADModel.from_target(target), target, args, ROWS, peft_config=lora).create_model_card()
    assert not (tmp_path / "README.md").exists()


def test_an_adapter_of_the_target_is_named(tmp_path):
    from peft import LoraConfig, get_peft_model

    target = get_peft_model(make_target(), LoraConfig(target_modules=["q_proj"]))
    head = FSPADModel.from_target(make_target())
    assert make_card(make_trainer(tmp_path, target, head=head)).target_weights == "with an adapter (LORA)"


def test_datasets_of_the_hub_are_named():
    dataset = ROWS.select([0])
    assert hub_datasets(dataset) == hub_datasets(None) == []
    dataset.info.download_checksums = {
        f"hf://datasets/somebody/{name}@{SHA}/part.parquet": None for name in ("texts", "more", "texts")
    } | {"https://example.org/file": None}
    assert hub_datasets(dataset) == ["somebody/more", "somebody/texts"]
