"""What trainers push to a stand-in of the Hub, while they train and afterwards."""

import json
import re

import peft
import pytest
import transformers
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from fspad.cli.train import run_training
from fspad.trainer import pushing
from helpers.dialogues import make_tokenizer
from helpers.hub_server import TOKEN, Fault
from helpers.models import make_head, make_target
from helpers.pushes import HEAD, SAVED, check_two_commits, commits, pinned
from helpers.trainers import make_trainer


def pushing_trainer(folder, **arguments):
    trainer = make_trainer(folder / "head", processing_class=make_tokenizer(), hub_model_id=HEAD, **arguments)
    # Whatever brings a tokenizer into the folder, it belongs to the target
    trainer.processing_class = make_tokenizer()
    (folder / "head").mkdir(exist_ok=True)
    (folder / "head" / "events.out").write_text("mine")
    return trainer


def check_no_tokenizer_and_no_pickle(files):
    assert not [name for name in files if re.search(r"token|vocab|chat_template|\.bin|\.pt", name)]


@pytest.mark.parametrize("blocking", [True, False])
def test_trainer_pushes_what_a_head_is(hub, tmp_path, blocking):
    trainer = pushing_trainer(tmp_path)
    trainer.train()
    info = trainer.push_to_hub(blocking=blocking, license="mit", commit_message="Done")
    info = info if blocking else info.result()
    check_two_commits(*commits(hub), {*SAVED, "training_args.json"})
    check_no_tokenizer_and_no_pickle(commits(hub)[-1].files)
    assert info.oid == commits(hub)[0].oid
    assert (tmp_path / "head" / "tokenizer.json").is_file(), "or the test shows nothing"
    assert "license: mit" in commits(hub)[1].files["README.md"].decode()
    assert commits(hub)[0].message == "Done"


def test_training_arguments_can_be_read_and_tell_nothing_of_the_machine(hub, tmp_path):
    trainer = pushing_trainer(tmp_path, hub_token=TOKEN)
    trainer.push_to_hub()
    text = commits(hub)[0].files["training_args.json"].decode()
    arguments = json.loads(text)
    assert arguments["learning_rate"] == 1e-3
    assert arguments["num_draft_steps"] == 1
    assert str(tmp_path) not in text
    assert "hub" not in text.lower()
    assert not (tmp_path / "head" / "training_args.bin").exists()


class SlowHub(transformers.TrainerCallback):
    """Lets the Hub answer only once training is over."""

    def __init__(self, hub):
        self.hub = hub

    def on_train_begin(self, *args, **kwargs):
        self.hub.lock.acquire()

    def on_train_end(self, *args, **kwargs):
        self.hub.lock.release()


def checkpointing_trainer(folder, **arguments):
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    return pushing_trainer(folder, push_to_hub=True, hub_token=TOKEN, **saving, **arguments)


def folder_of(name):
    folder, separator, _ = name.partition("/")
    return folder if separator else ""


@pytest.mark.parametrize(
    ("strategy", "folders"),
    [
        ("end", []),
        ("every_save", [set(), set()]),
        ("checkpoint", [set(), *[{"last-checkpoint"}] * 3]),
        ("all_checkpoints", [set(), *[{"checkpoint-2"}] * 2, {"checkpoint-2", "checkpoint-4"}]),
    ],
)
def test_pushes_while_training(hub, tmp_path, strategy, folders):
    """However slow the Hub is: checkpoints are deleted before it takes them."""
    trainer = checkpointing_trainer(tmp_path, hub_strategy=strategy, hub_always_push=True)
    trainer.add_callback(SlowHub(hub))
    trainer.train()
    names = {*SAVED, "training_args.json"}
    assert [
        {folder_of(name) for name in commit.files if "checkpoint" in folder_of(name)} for commit in commits(hub)
    ] == folders
    weights = [
        commit.files["model.safetensors"] for commit in commits(hub) if not commit.message.endswith("checkpoint")
    ]
    assert len(set(weights)) == len(weights) == {"end": 0}.get(strategy, 2)
    for commit in commits(hub):
        at_top = {name for name in commit.files if "checkpoint" not in folder_of(name)}
        assert at_top == names
        check_no_tokenizer_and_no_pickle(at_top)
        assert not any("training_args.bin" in name for name in commit.files)
    assert not list((tmp_path / "head").glob("_push*"))
    trainer.push_to_hub()
    *_, files, card = commits(hub)
    assert pinned(card) == files.oid


def test_pushes_that_fail_do_not_end_training(hub, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(pushing.logger, "warning", warnings.append)
    hub.faults.append(Fault("/commit/", times=1, status=403))
    trainer = checkpointing_trainer(tmp_path, hub_always_push=True)
    trainer.train()
    assert trainer.state.global_step == 4
    (warning,) = warnings
    assert "Not pushed: 'Training in progress, step 2' (HfHubHTTPError" in warning
    assert [commit.message for commit in commits(hub)] == ["Training in progress, step 4"]


def test_the_command_pushes_once(hub, tmp_path):
    run_training(pushing_trainer(tmp_path, push_to_hub=True, hub_token=TOKEN, hub_private_repo=True))
    check_two_commits(*commits(hub), {*SAVED, "training_args.json"})
    assert hub.repositories[HEAD].is_private


def test_saving_pushes_if_asked_for(hub, tmp_path):
    trainer = pushing_trainer(tmp_path, push_to_hub=True, hub_token=TOKEN, hub_revision="dev")
    HfApi().create_branch(HEAD, branch="dev")
    trainer.save_model()
    check_two_commits(*commits(hub, "dev"), {*SAVED, "training_args.json"})
    assert commits(hub, "dev")[0].message == "Model save"


def test_trainer_after_a_failure_for_good(hub, tmp_path):
    trainer = pushing_trainer(tmp_path)
    hub.faults.append(Fault("/commit/", times=1, status=403))
    with pytest.raises(HfHubHTTPError) as caught:
        trainer.push_to_hub(revision="v1")
    assert str(tmp_path / "head") in caught.value.__notes__[0]
    assert "revision='v1'" in caught.value.__notes__[0]
    assert all((tmp_path / "head" / name).is_file() for name in {*SAVED, "README.md", "training_args.json"})
    trainer.push_to_hub(revision="v1")
    check_two_commits(*commits(hub, "v1"), {*SAVED, "training_args.json"})


def test_adapters_are_pushed_with_the_card_of_peft(hub, tmp_path):
    target = make_target()
    peft_config = peft.LoraConfig(r=4, target_modules="all-linear")
    trainer = make_trainer(
        tmp_path, target, head=peft.get_peft_model(make_head(target), peft_config), hub_model_id=HEAD
    )
    trainer.push_to_hub()
    names = {"adapter_config.json", "adapter_model.safetensors", "training_args.json", "README.md"}
    assert set(commits(hub)[-1].files) == names
    assert ModelCard(commits(hub)[-1].files["README.md"].decode()).data.library_name == "peft"
