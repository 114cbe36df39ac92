"""How `fspad train` reads its arguments: names, YAML, presets, mixtures, and what is wrong in one line."""

import json
import re

import pytest
from typer.testing import CliRunner

from fspad.cli import app
from fspad.cli.train import TrainParser, make_trainer, parse
from fspad.trainer import FSPADTrainingArguments
from helpers.dialogues import make_tokenizer
from helpers.models import make_target

ROWS = [{"prompt_ids": [1, 2, n], "response_ids": [3, 4, 5 + n, 6, 7]} for n in range(12)]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Arguments of a training on tiny files."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    make_target().save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {
        "output-dir": tmp_path / "head",
        "target": tmp_path / "target",
        "train-file": tmp_path / "a.jsonl",
        "report-to": "none",
        "num-eval-prompts": 0,
        "max-steps": 1,
        "disable-tqdm": True,
    }


def words(values, *more):
    return [str(word) for name, value in values.items() for word in (f"--{name}", value)] + [*map(str, more)]


def refused(*arguments) -> str:
    """The one line that the command fails with."""
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.stderr).rstrip()
    assert "Traceback" not in text
    assert text.splitlines()[-1].startswith("Error: ")
    return text.splitlines()[-1]


def test_hyphens_and_underscores(files):
    for style in ("-", "_"):
        given = {name.replace("-", style): value for name, value in files.items()}
        options, training = parse(words(given, f"--draft{style}vocab{style}size", 50))
        assert options.train_file == [str(files["train-file"])]
        assert (training.draft_vocab_size, training.max_steps) == (50, 1)


def test_help_is_in_groups_with_defaults():
    text = TrainParser(FSPADTrainingArguments).format_help()
    titles = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    assert titles == [
        "help",
        "target, head and dialogues",
        "training of a head",
        "the most usual ones of transformers' TrainingArguments",
        "all others of transformers' TrainingArguments",
    ]
    own, usual, rest = (text.index(title) for title in titles[2:])
    assert text.index("--train-file") < own < text.index("--draft-vocab-size") < usual
    assert usual < text.index("--gradient-accumulation-steps") < rest < text.index("--tf32")
    section = " ".join(text[own:usual].split())
    assert all(f"(default: {value})" in section for value in (0.0003, 0.05, "measure"))
    result = CliRunner().invoke(app, ["train", "--help"])
    assert result.exit_code == 0
    assert "target, head and dialogues" in result.output


def test_yaml(tmp_path, files):
    path = tmp_path / "training.yaml"
    path.write_text(
        "\n".join(f"{name}: {value}" for name, value in files.items())
        + "\nlearning_rate: 5e-5\nbf16: true\nfeature-sampling: false\nlr_scheduler_kwargs: {}\nsave_total_limit: null\n"
    )
    options, training = parse([str(path), "--max-steps", "7"])
    assert (training.learning_rate, training.max_steps, training.save_total_limit) == (5e-5, 7, None)
    assert (options.feature_sampling, options.partial_alignment) == (False, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: [1, 2]", "unknown arguments: 2;"),
        ("max_steps: soon", "argument --max_steps/--max-steps: invalid int value: 'soon'"),
        ("bf16: perhaps", "Truthy value expected: got perhaps"),
        ("max_length: {a: 1}", "invalid int value"),
        ("epochs: 3", "unknown arguments in .*: epochs; see `fspad train --help`"),
        ("- a\n- b", "expected lines of `name: value` in .*, got list"),
        ("a: [", "expected YAML in .*, got what cannot be read"),
    ],
)
def test_yaml_that_cannot_be_used(tmp_path, files, text, message):
    path = tmp_path / "training.yaml"
    path.write_text(text)
    assert re.search(message, refused(path, *words(files)))


def test_missing_or_unreadable_yaml(tmp_path):
    assert refused(tmp_path / "none.yaml") == f"Error: no such file: {tmp_path / 'none.yaml'}"
    (tmp_path / "latin.yaml").write_bytes("output_dir: caf\xe9".encode("latin-1"))
    assert "expected YAML in" in refused(tmp_path / "latin.yaml")


def test_preset(files):
    _, training = parse(words(files, "--preset", "paper", "--learning-rate", "1e-4"))
    assert (training.warmup_steps, training.num_train_epochs, training.learning_rate) == (2000, 20, 1e-4)
    _, training = parse(words(files))
    assert (training.warmup_steps, training.logging_steps) == (0.05, 10)


def test_a_file_to_evaluate_on_is_evaluated_on(files):
    evaluated = files | {"eval-file": files["train-file"]}
    assert parse(words(evaluated))[1].eval_strategy == "epoch"
    assert parse(words(evaluated, "--eval-strategy", "no"))[1].eval_strategy == "no"
    assert parse(words(files))[1].eval_strategy == "no"


def test_mixture(tmp_path, files):
    both = files | {"train-file": f"{tmp_path / 'a.jsonl'}"}
    arguments = [*words(both), "--train-file", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert len(make_trainer(arguments).train_dataset) == 24
    assert len(make_trainer([*arguments, "--mixture-weights", "1", "3"]).train_dataset) < 24
    assert "expected a positive weight for each of the 2 datasets, got [1.0]" in refused(
        *arguments, "--mixture-weights", 1
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--per-device-train-batch-size", 0), "expected per_device_train_batch_size of at least 1, got 0"),
        (("--learning-rate", -1), "expected learning_rate above 0, got -1.0"),
        (("--learning-rate", "fast"), "invalid float value: 'fast'"),
        (("--feature-noise", -0.1), "expected feature_noise of at least 0, got -0.1"),
        (("--logits-chunk-size", 0), "expected logits_chunk_size of at least 1, got 0"),
        (("--max-length", 1), "expected max_length of at least 3, got 1"),
        (("--draft-vocab-size", 98), "expected a draft vocabulary of"),
        (("--num-draft-steps", 0), "expected num_draft_steps of at least 1, got 0"),
        (("--num-draft-tokens", "many"), "expected num_draft_tokens as a number from 1 to 1024"),
        (("--neftune-noise-alpha", 5), "expected no neftune_noise_alpha, got 5.0"),
        (("--label-smoothing-factor", 0.1), "expected no label_smoothing_factor, got 0.1"),
        (("--warmup-steps", -1), "warmup_steps"),
        (("--no-such-thing", 1), "unknown arguments: --no-such-thing 1; see `fspad train --help`"),
        (("--target-dtype", "int3"), "invalid choice: 'int3'"),
        (("--optim", "magic"), "magic"),
        (("--report-to", "comet_ml"), "report_to=comet_ml needs a package that is missing"),
    ],
)
def test_wrong_arguments(files, arguments, message):
    assert message in refused(*words(files), *arguments)


def test_output_folder_that_cannot_be_written_to(tmp_path, files):
    (tmp_path / "file").write_text("no folder")
    error = refused(*words(files | {"output-dir": tmp_path / "file" / "head"}))
    assert "expected a folder that can be written to as output_dir" in error


def test_full_disk_at_a_checkpoint(files, monkeypatch):
    import safetensors

    def write(*args, **kwargs):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", write)
    assert "make room, and give `resume_from_checkpoint` to go on" in refused(
        *words(files, "--save-strategy", "steps", "--save-steps", 1)
    )
