"""`fspad serve`, without vLLM."""

import pytest

import fspad.cli.serve
from fspad import FSPADModel
from fspad.bench.smollm2 import TARGET_NAME
from helpers.commands import plain, run


@pytest.fixture
def served(monkeypatch):
    """What a server would be started with."""
    calls = []

    def run_server(command, url, tell, log):
        head = command[command.index("--speculative-config") + 1] if "--speculative-config" in command else None
        calls.append({"command": command, "url": url, "head": head, "log": log})
        return 3

    monkeypatch.setattr(fspad.cli.serve, "check_installed", lambda: None)
    monkeypatch.setattr(fspad.cli.serve, "check_port", lambda host, port: None)
    monkeypatch.setattr(fspad.cli.serve, "run_server", run_server)
    monkeypatch.setattr(fspad.cli.serve, "keep_dequantised", lambda: "kept/smollm2")
    return calls


def test_a_given_pair(served, saved_head):
    more = ("--num-draft-tokens", 2, "--port", 81, "--log", "log", "--vllm-args", "--dtype float32 --seed 1")
    result = run("serve", "org/target", saved_head, *more)
    assert result.exit_code == 3, result.output
    (call,) = served
    assert call["url"] == "http://127.0.0.1:81"
    assert call["command"][-4:] == ["--dtype", "float32", "--seed", "1"]
    assert call["command"][call["command"].index("--model") + 1] == "org/target"
    assert '"num_speculative_tokens": 2' in call["head"]
    assert str(call["log"]) == "log"


def test_by_default_the_shipped_head_and_its_target(served):
    run("serve")
    command = served[0]["command"]
    assert command[command.index("--model") + 1] == "kept/smollm2"
    assert command[command.index("--served-model-name") + 1] == TARGET_NAME


def test_without_a_head_to_compare_with(served):
    run("serve", "--plain")
    assert served[0]["head"] is None
    assert served[0]["command"][-2:] == ["--served-model-name", TARGET_NAME]


def test_a_head_does_not_say_which_folder_is_served(served, tmp_path, saved_head):
    head = FSPADModel.from_pretrained(saved_head)
    head.config.target_model_name = str(tmp_path)
    head.save_pretrained(tmp_path / "head")
    result = run("serve", "--", "", tmp_path / "head")
    assert result.exit_code == 1
    assert "name the target" in plain(result.output)
    assert not served


def test_without_vllm_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("fspad.serving.server.find_spec", lambda name: None)
    result = run("serve")
    assert result.exit_code == 1
    assert "constraints-vllm.txt" in plain(result.output)
