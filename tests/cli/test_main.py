"""The command line, end to end on tiny models."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

import fspad
from fspad.bench.measuring import Answer, Comparison, compare, total
from fspad.cli.demo import results_table
from fspad.cli.train import make_trainer
from helpers.commands import plain, run
from helpers.models import make_target, tiny_tokenizer


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    """Folders of a tiny target with a tokenizer, and of a head for it."""
    target = make_target()
    tiny_tokenizer().save_pretrained(tmp_path / "target")
    target.save_pretrained(tmp_path / "target")
    fspad.FSPADModel.from_target(target).save_pretrained(tmp_path / "head")
    return tmp_path / "target", tmp_path / "head"


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"w1 w{i} w7"}) + "\n" for i in range(4)))
    return path


@pytest.mark.parametrize("command", ["demo", "bench", "convert", "train", "synthesize"])
def test_every_command_has_help(command):
    assert command in run("--help").output
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "--target" in plain(result.output)
    assert "--target" not in plain(run("export", "--help").output)


def test_help_of_train_lists_the_training_arguments():
    output = plain(run("train", "--help").output)
    assert all(name in output for name in ("--draft-vocab-size", "--learning-rate", "--feature-loss-weight"))


def test_demo_answers_are_identical_and_measured(pair, prompts):
    target, head = pair
    options = ("--prompts", prompts, "--num-prompts", 2, "--max-new-tokens", 12, "--dtype", "float32")
    result = run("demo", "--head", head, "--target", target, *options)
    assert result.exit_code == 0, result.output
    output = plain(result.output)
    assert output.count("plain and FSPAD: identical") == 2
    assert output.endswith("fp32 check: identical.")
    assert "float32" in output
    assert "tau" in output


def test_demo_with_drafts_of_a_given_size(pair, prompts, monkeypatch):
    target, head = pair
    stock, sizes = fspad.cli.demo.compare, []
    monkeypatch.setattr(
        fspad.cli.demo,
        "compare",
        lambda target, head, *args: sizes.append(head.config.num_draft_tokens) or stock(target, head, *args),
    )
    options = ("--head", head, "--target", target, "--prompts", prompts, "--num-prompts", 1, "--max-new-tokens", 4)
    # Names with hyphens or underscores
    for more in ((), ("--num-draft-tokens", 6), ("--num_draft_tokens", 7)):
        result = run("demo", *options, *more)
        assert result.exit_code == 0, result.output
    assert sizes[1:] == [6, 7]
    assert run("demo", *options, "--num-draft-tokens", 0).exit_code == 2


def test_demo_samples_with_a_temperature(pair, prompts):
    target, head = pair
    options = ("--prompts", prompts, "--num-prompts", 1, "--max-new-tokens", 12, "--temperature", 0.8)
    options = (*options, "--dtype", "float32")
    result = run("demo", "--head", head, "--target", target, *options)
    assert result.exit_code == 0, result.output
    assert "identical" in result.output


@pytest.mark.parametrize(("dtype", "exit_code"), [("float32", 1), ("bfloat16", 0)])
def test_demo_fails_on_a_difference_only_in_float32(dtype, exit_code, pair, prompts, monkeypatch):
    target, head = pair
    stock = fspad.cli.demo.compare

    def compare_wrongly(target, *args):
        comparisons = stock(target, *args)
        if target.dtype == getattr(torch, dtype):
            comparisons[0].assisted[0].token_ids[-1] = (comparisons[0].plain[0].token_ids[-1] + 1) % 97
        return comparisons

    monkeypatch.setattr(fspad.cli.demo, "compare", compare_wrongly)
    options = ("--prompts", prompts, "--num-prompts", 1, "--max-new-tokens", 6, "--dtype", dtype)
    result = run("demo", "--head", head, "--target", target, *options)
    assert result.exit_code == exit_code
    assert "--- plain" in result.output
    assert ("near-ties" in result.output) == (dtype == "bfloat16")
    verdict = "identical." if exit_code == 0 else "1 of 1 answers DIFFER, which must not be: please report this."
    assert plain(result.output).endswith(f"fp32 check: {verdict}")


def test_demo_without_a_head_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(fspad, "__file__", str(tmp_path / "site-packages" / "fspad" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    result = run("demo")
    assert result.exit_code == 1
    assert "--head PATH_OR_ID" in plain(result.output)


def test_demo_finds_the_head_of_the_checkout_it_is_run_in(pair, prompts, monkeypatch, tmp_path):
    target, head = pair
    shutil.copytree(head, tmp_path / "examples" / "heads" / "smollm2-135m-instruct")
    monkeypatch.setattr(fspad, "__file__", str(tmp_path / "site-packages" / "fspad" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    result = run("demo", "--target", target, "--prompts", prompts, "--num-prompts", 1, "--max-new-tokens", 4)
    assert result.exit_code == 0, result.output


def test_demo_refuses_another_kind_of_head(pair):
    target, _ = pair
    result = run("demo", "--head", target, "--target", target)
    assert result.exit_code == 1
    assert "'llama'" in result.output


def edit_config(head: Path, **fields) -> None:
    config = json.loads((head / "config.json").read_text())
    (head / "config.json").write_text(json.dumps({**config, **fields}))


def test_a_head_with_another_vocabulary_is_refused(pair, prompts, tmp_path):
    target, head = pair
    edit_config(head, target_vocab_hash="0" * 64)
    dialogues = tmp_path / "dialogues.jsonl"
    dialogues.write_text('{"prompt_ids": [1, 2], "response_ids": [3, 4, 5]}\n')
    files = ("--train_file", dialogues, "--output_dir", tmp_path / "more", "--use_cpu")
    for command in (("demo", "--prompts", prompts), ("train", *files)):
        result = run(*command, "--head", head, "--target", target)
        assert result.exit_code == 1
        assert "trained with another vocabulary" in plain(result.output)


def test_demo_does_not_read_folders_that_a_head_names(pair):
    target, head = pair
    edit_config(head, target_model_name=str(target))
    result = run("demo", "--head", head)
    assert result.exit_code == 1
    assert "name it with `--target`" in plain(result.output)


def test_demo_says_where_it_looked_for_a_head(tmp_path):
    result = run("demo", "--head", tmp_path / "missing")
    assert result.exit_code == 1
    assert "no head could be loaded" in plain(result.output)
    assert str(tmp_path / "missing") in result.output


def test_train_without_its_extra_is_one_line(monkeypatch):
    stock = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else stock(name))
    result = run("train", "--help")
    assert result.exit_code == 1
    assert result.output.strip() == 'Error: training needs datasets: `pip install "fspad[train]"`'


def test_synthesize_then_train_then_demo(pair, prompts, tmp_path):
    target, _ = pair
    dialogues, trained = tmp_path / "dialogues.jsonl", tmp_path / "trained"
    options = ("--target", target, "--max-new-tokens", 8)
    for expected in (4, 0):  # nothing is left to do the second time
        result = run("synthesize", "--prompts", prompts, "--output", dialogues, *options)
        assert result.exit_code == 0, result.output
        assert f"Wrote {expected} dialogues" in plain(result.output)

    short = ("--max_steps", 1, "--eval_max_new_tokens", 6, "--no_partial_alignment", "--use_cpu")
    options = ("--draft_vocab_size", 40, "--num_draft_tokens", 8, *short)
    result = run("train", "--target", target, "--train_file", dialogues, "--output_dir", trained, *options)
    assert result.exit_code == 0, result.output
    head = fspad.FSPADModel.from_pretrained(trained)
    assert (head.config.draft_vocab_size, head.config.partial_alignment) == (40, False)
    assert head.config.num_draft_tokens == 8
    assert "## Training" in (trained / "README.md").read_text()

    continued = ("--head", trained, "--eval_file", dialogues, *short)
    result = run("train", "--target", target, "--train_file", dialogues, "--output_dir", tmp_path / "more", *continued)
    assert result.exit_code == 0, result.output
    result = run("demo", "--head", tmp_path / "more", "--target", target, "--prompts", prompts, "--max-new-tokens", 4)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "got neither"),
        (("--train_file", "missing.jsonl"), "no such file: missing.jsonl"),
    ],
)
def test_train_says_which_dialogues_are_missing(arguments, message, tmp_path):
    result = run("train", "--output_dir", tmp_path, *arguments)
    assert result.exit_code == 1
    assert message in plain(result.output)


def test_train_takes_its_arguments_from_a_file(pair, tmp_path):
    target, _ = pair
    dialogues = tmp_path / "dialogues.jsonl"
    dialogues.write_text('{"prompt_ids": [1, 2], "response_ids": [3, 4, 5]}\n' * 4)
    config = tmp_path / "head.yaml"
    config.write_text(
        f"target: {target}\ntrain_file: {dialogues}\noutput_dir: {tmp_path / 'head'}\nuse_cpu: true\nmax_steps: 9\n"
        "learning_rate: 5e-4\nnum_draft_steps: 2\npartial_alignment: false\nlr_scheduler_kwargs: {}\n"
    )
    result = run("train", config, "--max_steps", 1)
    assert result.exit_code == 0, result.output
    args = json.loads((tmp_path / "head" / "training_args.json").read_text())
    assert (args["learning_rate"], args["num_draft_steps"], args["max_steps"]) == (5e-4, 2, 1)
    assert not fspad.FSPADModel.from_pretrained(tmp_path / "head").config.partial_alignment


def test_new_heads_follow_the_seed(pair, tmp_path):
    target, _ = pair
    dialogues = tmp_path / "dialogues.jsonl"
    dialogues.write_text('{"prompt_ids": [1, 2], "response_ids": [3, 4, 5]}\n' * 4)
    arguments = [f"--target={target}", f"--train_file={dialogues}", f"--output_dir={tmp_path}", "--use_cpu"]
    one, same, other = (make_trainer([*arguments, f"--seed={seed}"]).model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    assert not torch.equal(one["feature_sampling.fc.weight"], other["feature_sampling.fc.weight"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("train_fil: a", "unknown arguments in .*: train_fil;"),
        ("- a", "expected lines of `name: value` in .* got list"),
        ("a: [", "expected YAML in"),
    ],
)
def test_unusable_files_of_arguments(text, message, tmp_path):
    path = tmp_path / "head.yaml"
    if text is not None:
        path.write_text(text)
    result = run("train", path)
    assert result.exit_code == 1
    assert re.search(message, plain(result.output))


def test_compare_measures_both_ways_and_counts_steps():
    target = make_target()
    head = fspad.FSPADModel.from_target(target)
    inputs = [{"input_ids": torch.randint(0, 97, (1, 5)), "attention_mask": torch.ones(1, 5, dtype=torch.long)}] * 3
    calls = []
    comparisons = compare(target, head, inputs, max_new_tokens=9, on_answer=lambda: calls.append(1))
    assert len(calls) == 6
    for comparison in comparisons:
        assert comparison.is_identical
        assert comparison.num_tokens == 9
        assert sum(comparison.assisted[0].accept_lengths) == 8  # the prefill's token is no step
        assert comparison.plain[0].accept_lengths == []


def test_figures_are_tokens_by_time_and_tokens_by_steps():
    first = Comparison([Answer([1] * 10, 2.0, [])], [Answer([1] * 10, 1.0, [4, 5])])
    second = Comparison([Answer([2] * 2, 1.0, [])], [Answer([2] * 2, 1.0, [1])])
    both = total([first, second])
    assert (first.plain_speed, first.assisted_speed, first.speedup, first.tau) == (5.0, 10.0, 2.0, 4.5)
    assert (both.plain_speed, both.assisted_speed, both.speedup) == (4.0, 6.0, 1.5)
    assert both.tau == pytest.approx(10 / 3)
    assert Comparison([Answer([1], 1.0, [])], [Answer([1], 1.0, [])]).tau == 1.0
    console = Console(record=True, width=100)
    console.print(results_table([first, second]))
    assert re.search(r"all +│ +12 │ +4\.0 │ +6\.0 │ +1\.50 │ +3\.33", console.export_text())


def test_prompts_file_errors_name_the_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n\n{"text": "two"}\n')
    result = run("demo", "--prompts", path)
    assert result.exit_code == 1
    assert "prompts.jsonl:3: expected" in plain(result.output)
    path.write_text("\n")
    assert "is empty: expected lines such as" in plain(run("demo", "--prompts", path).output)
