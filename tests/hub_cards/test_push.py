"""Pushing heads to a stand-in of the Hub, and what strangers can do with them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from fspad.cli.loading import find_shipped_head
from fspad.hub_cards import FSPADModelCard, Measurement, push_folder, push_head
from helpers.hub_server import TOKEN, Fault
from helpers.models import make_head, make_target
from helpers.pushes import HEAD, SAVED, check_two_commits, commits, pinned


def test_head_is_pushed_in_two_commits(hub):
    info = make_head(make_target()).push_to_hub(HEAD, tags=["mine"])
    check_two_commits(*commits(hub))
    assert info.oid == commits(hub)[0].oid
    assert [commit.message for commit in commits(hub)] == ["Upload FSPAD head", "Upload FSPAD head: model card"]
    assert "mine" in ModelCard(commits(hub)[1].files["README.md"].decode()).data.tags


def test_names_without_a_user_are_completed(hub):
    make_head(make_target()).push_to_hub("head", commit_message="First")
    check_two_commits(*commits(hub))
    assert commits(hub)[0].message == "First"


def test_pushing_again_sends_what_changed(hub):
    target = make_target()
    make_head(target).push_to_hub(HEAD)
    hub.requests.clear()
    make_head(target, seed=1).push_to_hub(HEAD)
    *_, files, card = commits(hub)
    check_two_commits(files, card, {*SAVED, "README.md"})
    assert sum(request.startswith("PUT /lfs/") for request in hub.requests) == 1


def test_a_card_of_ones_own(hub):
    head = make_head(make_target())
    card = FSPADModelCard(head.config, path="somewhere", measurements=[Measurement("Prompts", 0, 2.5)], license="mit")
    push_head(head, HEAD, card=card)
    check_two_commits(*commits(hub))
    text = commits(hub)[1].files["README.md"].decode()
    assert "license: mit" in text
    assert "2.50" in text


def test_saving_can_push(hub, tmp_path):
    make_head(make_target()).save_pretrained(tmp_path / "head", push_to_hub=True, commit_message="Saved", private=True)
    check_two_commits(*commits(hub))
    assert commits(hub)[0].message == "Saved"
    assert hub.repositories[HEAD].is_private
    assert (tmp_path / "head" / "custom_generate" / "generate.py").is_file()


def test_private_repositories_need_a_token(hub, monkeypatch):
    make_head(make_target()).push_to_hub(HEAD, private=True)
    assert HfApi().model_info(HEAD).private
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info(HEAD, token=False)
    monkeypatch.delenv("HF_TOKEN")
    make_head(make_target(), seed=1).push_to_hub(HEAD, token=TOKEN)
    assert len(commits(hub)) == 4


def test_branch(hub):
    make_head(make_target()).push_to_hub(HEAD, revision="v2")
    check_two_commits(*commits(hub, "v2"))
    assert commits(hub) == []


def test_pull_request_has_both_commits(hub):
    info = make_head(make_target()).push_to_hub(HEAD, create_pr=True)
    check_two_commits(*commits(hub, "refs/pr/1"))
    assert info.pr_url == f"{hub.endpoint}/{HEAD}/discussions/1"
    assert set(hub.repositories[HEAD].refs) == {"main", "refs/pr/1"}
    assert commits(hub) == []
    with pytest.raises(ValueError, match="drop revision='v2'"):
        make_head(make_target()).push_to_hub(HEAD, create_pr=True, revision="v2")


def test_folders_are_pushed_with_their_own_card_or_a_new_one(hub, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"without config\.json"):
        push_folder(tmp_path, HEAD)
    make_head(make_target()).save_pretrained(tmp_path)
    push_folder(tmp_path, HEAD)
    check_two_commits(*commits(hub))
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    push_folder(tmp_path, HEAD)
    assert commits(hub)[-1].files["README.md"].endswith(b"Mine.\n")


def bare_folder(folder: Path, **card) -> Path:
    """A head without code, with a card that says where it was, as in a checkout."""
    head = make_head(make_target(), seed=1)
    head.save_pretrained(folder / "saved")
    bare = folder / "examples" / "head"
    bare.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / "saved" / name).read_bytes())
    config = json.loads((bare / "config.json").read_text())
    del config["auto_map"]
    (bare / "config.json").write_text(json.dumps(config))
    measured = [Measurement("Prompts", 0, 2.5)]
    FSPADModelCard(head.config, path="examples/head", measurements=measured, target="somebody/target", **card).save(
        bare
    )
    return bare


def test_a_folder_of_a_checkout_gets_code_and_a_card_that_says_where_it_is(hub, tmp_path):
    bare = bare_folder(tmp_path)
    before = {path.name: path.read_bytes() for path in bare.iterdir()}
    push_folder(bare, HEAD)
    check_two_commits(*commits(hub))
    text = commits(hub)[1].files["README.md"].decode()
    assert "examples/head" not in text
    assert "2.50" in text, "what else the card told"
    assert 'target_id = "somebody/target"' in text
    assert {path.name: path.read_bytes() for path in bare.iterdir()} == before, "the folder is left as it is"
    config = json.loads(commits(hub)[1].files["config.json"])
    assert config["auto_map"]["AutoModel"] == "modeling_fspad.FSPADModel"
    # From there to another repository, whose name takes the place of the first
    push_folder(bare, "user/second")
    files, card = commits(hub, repo="user/second")
    assert HEAD not in card.files["README.md"].decode()
    assert files.oid in card.files["README.md"].decode()


def test_the_shipped_head_can_be_pushed(hub):
    shipped = find_shipped_head()
    push_folder(shipped, HEAD)
    files, card = commits(hub)
    assert set(card.files) == {*SAVED, "README.md", "acceptance_by_depth.png"}
    assert pinned(card) == files.oid
    assert "examples/heads" not in card.files["README.md"].decode().partition("## The head")[0]


@pytest.mark.parametrize(
    ("name", "content"), [("config.json", b"null"), ("model.safetensors", b"\0" * 9), ("adapter_config.json", b"{}")]
)
def test_what_nobody_could_load_is_not_pushed(name, content, hub, tmp_path):
    make_head(make_target()).save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged|beside it"):
        push_folder(tmp_path, HEAD)
    assert HEAD not in hub.repositories


def test_code_that_is_there_is_kept_and_code_with_a_hole_replaced(hub, tmp_path):
    make_head(make_target()).save_pretrained(tmp_path)
    for change, kept in ((lambda file: file.write_text(f"# mine\n{file.read_text()}"), True), (Path.unlink, False)):
        change(tmp_path / "candidates.py")
        push_folder(tmp_path, HEAD)
        files = commits(hub)[-1].files
        assert files["candidates.py"].startswith(b"# mine") == kept
        assert set(files) >= SAVED


def test_pushed_heads_know_their_repository(hub):
    make_head(make_target()).push_to_hub("head")
    text = commits(hub)[1].files["custom_generate/generate.py"].decode()
    assert f'REPOSITORY: str | None = "{HEAD}"' in text


def test_the_license_is_that_of_the_target_if_the_hub_knows_it(hub, monkeypatch):
    head = make_head(make_target(), target_model_name="somebody/target")
    head.push_to_hub(HEAD)
    assert "license" not in ModelCard(commits(hub)[-1].files["README.md"].decode()).data.to_dict()
    info, model_info = SimpleNamespace(card_data=SimpleNamespace(license="apache-2.0")), HfApi.model_info

    def of_target(self, repo_id, **options):
        return info if repo_id == "somebody/target" else model_info(self, repo_id, **options)

    monkeypatch.setattr(HfApi, "model_info", of_target)
    for license, expected in ((None, "apache-2.0"), ("mit", "mit")):
        push_head(head, HEAD, card=FSPADModelCard(head.config, license=license))
        assert ModelCard(commits(hub)[-1].files["README.md"].decode()).data.license == expected


@pytest.mark.parametrize(
    "fault",
    [
        Fault("/api/repos/create", times=2),
        Fault("/api/repos/create", times=1, status=None, is_late=True),
        Fault("/commit/", times=3, status=500),
        Fault("/commit/", times=1, status=None),
        Fault("/commit/", times=1, status=None, is_late=True),
        Fault("/validate-yaml", times=1, status=502),
    ],
    ids=str,
)
def test_failures_that_pass(hub, fault):
    hub.faults.append(fault)
    make_head(make_target()).push_to_hub(HEAD)
    assert fault.times == 0
    check_two_commits(*commits(hub))


@pytest.mark.parametrize(
    ("fault", "num_requests"),
    [
        (Fault("/api/repos/create", times=99, status=403), 1),
        (Fault("/commit/", times=99, status=None), 4),
        (Fault("/commit/", times=99, status=403), 1),
        (Fault("/commit/", times=99, status=504), 4),
        (Fault("PUT /lfs/", times=99, status=400), 1),
    ],
    ids=str,
)
def test_after_failures_for_good_one_can_go_on(hub, fault, num_requests):
    """The call in the message finishes the push, and sends no file twice."""
    hub.faults.append(fault)
    with pytest.raises(Exception) as caught:  # noqa: PT011  # of the HTTP client, or of huggingface_hub
        make_head(make_target()).push_to_hub(HEAD, private=True)
    assert 99 - fault.times == num_requests
    (note,) = caught.value.__notes__
    folder, call = re.fullmatch(r"The head .* is complete in (\S+)\. Push again.*`(.*)`\.", note).groups()
    names = {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}
    assert names == {*SAVED, "README.md"}
    assert "private=True" in call
    hub.faults.clear()
    exec(call)
    assert set(commits(hub)[-1].files) == names
    assert hub.repositories[HEAD].is_private
    assert len([request for request in hub.requests if request.startswith("PUT")]) - (fault.pattern[0] == "P") == 1


def test_a_card_that_failed_is_pinned_by_the_call_in_the_message(hub):
    fault = Fault("/validate-yaml", times=4)
    hub.faults.append(fault)
    with pytest.raises(HfHubHTTPError) as caught:
        make_head(make_target()).push_to_hub(HEAD)
    assert len(commits(hub)) == 1
    exec(re.search(r"`(from .*)`", caught.value.__notes__[0])[1])
    check_two_commits(*commits(hub))


def test_no_second_pull_request_after_a_lost_answer(hub):
    hub.faults.append(Fault("/commit/", times=1, status=None, is_late=True))
    with pytest.raises(Exception, match="disconnected") as caught:
        make_head(make_target()).push_to_hub(HEAD, create_pr=True)
    assert "create_pr=True" in caught.value.__notes__[0]
    assert set(hub.repositories[HEAD].refs) == {"main", "refs/pr/1"}


STRANGER = """
import os, sys
sys.modules["fspad"] = None  # as if the package were not installed
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
tokenizer = AutoTokenizer.from_pretrained("target")
target = AutoModelForCausalLM.from_pretrained("target")
inputs = tokenizer("w1 w2 w3", return_tensors="pt")
options = {"max_new_tokens": 20, "do_sample": False}
plain = target.generate(**inputs, **options)
token, *repositories = sys.argv[1:]

def is_faster(output):
    assert torch.equal(output.sequences, plain)
    return output.accept_lengths.float().mean() > 1

def use_in_three_ways(name, files):
    # One: a loaded head, at the revision that the card pins
    head = AutoModel.from_pretrained(name, revision=files, trust_remote_code=True)
    assert files in type(head).__module__
    assert is_faster(target.generate(**inputs, assistant_model=head, return_dict_in_generate=True, **options))

    # Two: no head at all
    by_id = {"custom_generate": name, "trust_remote_code": True, "return_dict_in_generate": True, **options}
    assert is_faster(target.generate(**inputs, revision=files, **by_id))
    package = f"transformers_modules.{name.replace('/', '.')}."
    (kept,) = sys.modules[f"{package}{files}.custom_generate.generate"]._kept.values()
    assert files in type(kept).__module__
    assert is_faster(target.generate(**inputs, **by_id))
    copies = [name for name in sys.modules if name.startswith(package) and name.endswith("custom_generate.generate")]
    assert len(copies) == 2, "another commit"

    # By nobody that transformers knows: the file knows its repository, and its commit from where it lies
    function = target.load_custom_generate(name, trust_remote_code=True)
    assert is_faster(function(model=target, **inputs, return_dict_in_generate=True, **options))

    # Three: a pipeline
    text_generation = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=head)
    (result,) = text_generation("w1 w2 w3", return_tensors=True, **options)
    assert result["generated_token_ids"] == plain[0].tolist()
    return head

heads = [use_in_three_ways(*pair) for pair in zip(repositories[::2], repositories[1::2])]

# A private repository
for arguments in ({"token": False}, {"token": token}):
    try:
        private = {"custom_generate": "user/private", "trust_remote_code": True, "return_dict_in_generate": True}
        output = target.generate(**inputs, **private, **options, **arguments)
        print("private", is_faster(output).item())
    except OSError as error:
        print("refused:", "private" in str(error))

# Heads that came with their code can be pushed on
heads[0].push_to_hub("user/again", token=token)
again = AutoModel.from_pretrained("user/again", trust_remote_code=True)
assert is_faster(target.generate(**inputs, assistant_model=again, return_dict_in_generate=True, **options))
"""


def test_strangers_use_heads_in_three_ways(hub, tmp_path):
    """`STRANGER_PYTHON` may name the Python of an environment with torch and transformers alone, as `.ci/run` has it."""
    target = make_target()
    target.save_pretrained(tmp_path / "target")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(), unk_token="<unk>", model_input_names=["input_ids", "attention_mask"]
    )
    tokenizer.save_pretrained(tmp_path / "target")
    make_head(target, seed=1).push_to_hub(HEAD)
    push_folder(bare_folder(tmp_path), "user/bare")
    repositories = (name for repo in (HEAD, "user/bare") for name in (repo, commits(hub, repo=repo)[0].oid))
    make_head(target, seed=2).push_to_hub("user/private", private=True)
    environment = {**os.environ, **hub.environment(tmp_path / "cache", token=None)}
    del environment["HF_TOKEN"]
    result = subprocess.run(
        [os.environ.get("STRANGER_PYTHON", sys.executable), "-c", STRANGER, TOKEN, *repositories],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["refused: True", "private True"]
    assert set(commits(hub, repo="user/again")[-1].files) == {*SAVED, "README.md"}


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, **{f"w{i}": i for i in range(1, 97)}}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer
