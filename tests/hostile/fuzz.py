"""Gives hostile files to every way in, each in a process of its own, and checks what they can make it do.

    python tests/hostile/fuzz.py --seed 0 --count 500

No code of theirs may run, no way in may take over five seconds of a processor or 200 MB more than with honest files, and what is wrong
is said by a `ValueError` or `OSError`, on the command line in one message without a stack trace. Prints what broke that,
and ends with code 1 if anything did.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

# Read when they are imported
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": tempfile.mkdtemp(prefix="fspad-modules-")}

import peft
import torch
import transformers
import typer
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from fspad import FSPADConfig, FSPADModel
from fspad.cli import app
from helpers.goldens import read_golden
from helpers.models import make_head, make_target, tiny_tokenizer
from hostile.files import (
    any_json,
    any_value,
    bad_index,
    bad_pickle,
    bad_safetensors,
    edit_json,
    odd_file,
    odd_weights,
)

MOST_SECONDS = 5.0
MOST_WAITING = 60.0  # seconds, however busy the machine is
MOST_BYTES = 200 * 2**20
FIELDS = [*FSPADConfig.__annotations__, "auto_map", "architectures", "dtype", "quantization_config", "num_labels"]
OLD_FIELDS = ["rope_scaling", "rope_theta", "bias", "torch_dtype", "num_labels", "model_type", "head_dim", "d2t"]
ADAPTER_FIELDS = ["r", "target_modules", "rank_pattern", "base_model_name_or_path", "auto_mapping", "modules_to_save"]
Breaker = Callable[[random.Random, Path], str]


def make_honest(folder: Path) -> None:
    """Write honest files of every kind: target, head, adapter, checkpoint, prompts and dialogues."""
    target = make_target()
    target.save_pretrained(folder / "target")
    tiny_tokenizer().save_pretrained(folder / "target")
    head = make_head(target, draft_vocab_size=50)
    head.save_pretrained(folder / "head")
    adapted = peft.get_peft_model(make_head(target, draft_vocab_size=50), peft.LoraConfig(target_modules="all-linear"))
    adapted.save_pretrained(folder / "adapter")
    weights, _, config = read_golden("eagle")
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "checkpoint" / "model.safetensors")
    text = "".join(json.dumps({"prompt": f"w1 w{i}"}) + "\n" for i in range(3))
    (folder / "prompts.jsonl").write_text(text)
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]
    (folder / "dialogues.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 3)
    big = transformers.LlamaConfig(**{name: value for name, value in config.items() if name != "model_type"})
    big.save_pretrained(folder / "big_target")


def run_app(*arguments: str) -> None:
    """Run a command as a shell would, with its messages on standard error."""
    code = app(list(arguments), standalone_mode=False)
    if code:
        raise typer.Exit(code)


# What each way in does with a folder of honest or broken files
WAYS: dict[str, Callable[[Path], object]] = {
    "FSPADModel": lambda folder: FSPADModel.from_pretrained(folder / "head"),
    "AutoModel": lambda folder: AutoModel.from_pretrained(folder / "head"),
    "no package": lambda folder: load_without_package(folder / "head"),
    "load_adapter": lambda folder: FSPADModel.from_pretrained(folder / "head").load_adapter(folder / "adapter"),
    "adapter": lambda folder: beside(folder),
    "convert": lambda folder: run_app(
        "convert", f"{folder}/checkpoint", f"{folder}/out", "--target", f"{folder}/big_target"
    ),
    "export": lambda folder: run_app("export", f"{folder}/head", f"{folder}/out"),
    "demo": lambda folder: run_app(
        *("demo", "--head", f"{folder}/head", "--target", f"{folder}/target", "--dtype", "float32"),
        *("--prompts", f"{folder}/prompts.jsonl", "--num-prompts", "1", "--max-new-tokens", "4"),
    ),
    "train": lambda folder: run_app(
        *(
            "train",
            "--head",
            f"{folder}/head",
            "--target",
            f"{folder}/target",
            "--train_file",
            f"{folder}/dialogues.jsonl",
        ),
        *(
            "--output_dir",
            f"{folder}/out",
            "--max_steps",
            "1",
            "--report_to",
            "none",
            "--use_cpu",
            "--num_eval_prompts",
            "0",
        ),
    ),
}


def load_without_package(folder: Path) -> None:
    """Load as a process does where the package is not installed; nobody has trusted the code."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    CONFIG_MAPPING._extra_content.pop("fspad", None)
    MODEL_MAPPING._extra_content.pop(FSPADConfig, None)
    AutoModel.from_pretrained(folder, trust_remote_code=False)


def beside(folder: Path) -> None:
    """Load a head with an adapter beside it, which nobody has named."""
    for path in (folder / "adapter").iterdir():
        if path.name.startswith("adapter"):
            path.rename(folder / "head" / path.name)
    FSPADModel.from_pretrained(folder / "head")


# What is broken for each way in
def breakers(way: str, mark: Path) -> list[Breaker]:
    """Functions that break the files that a way in reads."""
    if way in ("load_adapter", "adapter"):
        return [
            lambda rng, folder: edit_json(rng, folder / "adapter" / "adapter_config.json", ADAPTER_FIELDS),
            lambda rng, folder: special_adapter(rng, folder / "adapter" / "adapter_config.json"),
            lambda rng, folder: write(folder / "adapter" / "adapter_config.json", any_json(rng)),
            lambda rng, folder: odd_file(rng, folder / "adapter" / "adapter_config.json"),
            lambda rng, folder: odd_file(rng, folder / "adapter" / "adapter_model.safetensors"),
            lambda rng, folder: bad_safetensors(rng, folder / "adapter" / "adapter_model.safetensors"),
            lambda rng, folder: odd_weights(rng, folder / "adapter" / "adapter_model.safetensors"),
        ]
    if way == "convert":
        return [
            lambda rng, folder: edit_json(rng, folder / "checkpoint" / "config.json", OLD_FIELDS),
            lambda rng, folder: edit_json(rng, folder / "checkpoint" / "config.json", OLD_FIELDS),
            lambda rng, folder: write(folder / "checkpoint" / "config.json", any_json(rng)),
            lambda rng, folder: odd_file(
                rng, folder / "checkpoint" / rng.choice(["config.json", "model.safetensors"])
            ),
            lambda rng, folder: bad_safetensors(rng, folder / "checkpoint" / "model.safetensors"),
            lambda rng, folder: odd_weights(rng, folder / "checkpoint" / "model.safetensors"),
            lambda rng, folder: bad_bin(rng, folder / "checkpoint", mark),
            lambda rng, folder: bad_bin(rng, folder / "checkpoint", mark),
            lambda rng, folder: bad_index(rng, folder / "checkpoint", rng.choice(["safetensors", "bin"])),
            lambda rng, folder: edit_json(rng, folder / "big_target" / "config.json", OLD_FIELDS),
        ]
    found: list[Breaker] = [
        lambda rng, folder: edit_json(rng, folder / "head" / "config.json", FIELDS),
        lambda rng, folder: edit_json(rng, folder / "head" / "config.json", FIELDS),
        lambda rng, folder: special_config(rng, folder / "head" / "config.json"),
        lambda rng, folder: write(folder / "head" / "config.json", any_json(rng)),
        lambda rng, folder: bad_safetensors(rng, folder / "head" / "model.safetensors"),
        lambda rng, folder: bad_safetensors(rng, folder / "head" / "model.safetensors"),
        lambda rng, folder: odd_weights(rng, folder / "head" / "model.safetensors"),
        lambda rng, folder: bad_index(rng, folder / "head", "safetensors"),
        lambda rng, folder: bad_code(rng, folder / "head", mark),
        lambda rng, folder: bad_bin(rng, folder / "head", mark),
    ]
    if way not in ("AutoModel", "no package"):  # which open files before any code of a head is asked
        found.append(
            lambda rng, folder: odd_file(rng, folder / "head" / rng.choice(["config.json", "model.safetensors"]))
        )
    if way == "demo":
        found.append(lambda rng, folder: write(folder / "prompts.jsonl", b"\n".join(any_json(rng) for _ in range(3))))
    if way == "train":
        found += [
            lambda rng, folder: write(folder / "dialogues.jsonl", b"\n".join(any_json(rng) for _ in range(3)))
        ] * 2
        found.append(lambda rng, folder: odd_dialogues(rng, folder / "dialogues.jsonl"))
    return found


def write(path: Path, content: bytes) -> str:
    """Write a file; returns what was done."""
    path.write_bytes(content)
    return f"{path.name}: {content[:40]!r}"


def special_config(rng: random.Random, path: Path) -> str:
    """What a configuration could try on purpose; returns what was done."""
    fields = rng.choice(
        [
            {"eos_token_id": [1] * 1_000_000},
            {"rope_parameters": {f"k{i}": i for i in range(300_000)}},
            {f"field{i}": i for i in range(300_000)},
            {"hidden_size": 2**16, "intermediate_size": 2**18},
            {"vocab_size": 2**24, "draft_vocab_size": 2**24},
            {"num_attention_heads": 0},
            {"num_key_value_heads": 0},
            {"auto_map": {"AutoConfig": "other/repo--x.Y", "AutoModel": "other/repo--x.Y"}},
            {"auto_map": {"AutoConfig": "../../x.Y", "AutoModel": "/etc/passwd.Y"}},
            {"auto_map": {f"Auto{i}": "x.Y" for i in range(100_000)}},
            {"model_type": rng.choice(["llama", "x", "", None, 5, "gpt2"])},
            {"transformers_weights": "../outside.bin", "quantization_config": {"quant_method": "gptq"}},
            {"target_model_name": rng.choice(["../target", "/etc", "a" * 2000, "x\ny"])},
            {"architectures": ["x" * 100] * 100_000},
        ]
    )
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **fields}))
    return f"config.json with {list(fields)[:2]}: {str(next(iter(fields.values())))[:40]}"


def special_adapter(rng: random.Random, path: Path) -> str:
    """What an adapter's configuration could try on purpose; returns what was done."""
    fields = rng.choice(
        [
            {"r": 8_000_000},
            {"target_modules": "(((a+)+)+)+$"},
            {"target_modules": [f"m{i}" for i in range(100_000)]},
            {"rank_pattern": {"(.*)*fc": 8_000_000}},
            {"alpha_pattern": {"(((.*)*)*)*x": 1}},
            {"exclude_modules": "(((a+)+)+)+$"},
            {"layers_pattern": "(((a+)+)+)+$", "layers_to_transform": [0]},
            {"base_model_name_or_path": "../target"},
            {"base_model_name_or_path": "other/repo"},
            {"auto_mapping": {"base_model_class": "x", "parent_library": "antigravity"}},
            {"modules_to_save": ["layer"]},
            {"peft_type": rng.choice(["VERA", "PREFIX_TUNING", "x", None, 5])},
            {"use_dora": True},
            {"init_lora_weights": "eva"},
            {"lora_alpha": float("inf")},
        ]
    )
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **fields}))
    return f"adapter_config.json with {str(fields)[:60]}"


def bad_bin(rng: random.Random, folder: Path, mark: Path) -> str:
    """Put a pickle in the place of the weights; returns what was done."""
    whole = folder / "model.safetensors"
    weights = load_file(whole)
    whole.unlink()
    first = next(iter(weights.values()))
    return bad_pickle(rng, folder / "pytorch_model.bin", {"fc.weight": first, **weights}, mark)


def bad_code(rng: random.Random, folder: Path, mark: Path) -> str:
    """Put code into the files beside a head that leaves a mark where it is run; returns what was done."""
    file = folder / rng.choice(
        ["modeling_fspad.py", "configuration_fspad.py", "custom_generate/generate.py", "hook.py"]
    )
    file.write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n{file.read_text()}")
    return f"{file.name} leaves a mark"


def odd_dialogues(rng: random.Random, path: Path) -> str:
    """Rows with the right columns and other contents; returns what was done."""
    column = rng.choice(
        ["messages", "prompt", "completion", "input_ids", "assistant_mask", "prompt_ids", "response_ids"]
    )
    rows = [{column: any_value(rng, 1), rng.choice(["messages", "completion", "response_ids"]): any_value(rng, 2)}] * 2
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{path.name}: {column} {str(rows[0][column])[:40]}"


def run_alone(way: str, folder: Path, log: Path) -> tuple[str, float, int]:
    """Take a way in, in a process of its own.

    Returns:
        How it ended, and the seconds of a processor and the bytes that the process took at most.
    """
    start = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = take(way, folder)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if time.perf_counter() - start > MOST_WAITING:
            os.kill(pid, 9)
        time.sleep(0.005)
    seconds = usage.ru_utime + usage.ru_stime
    code = os.waitstatus_to_exitcode(status)
    ends = {0: "accepted", 1: "refused", 2: "trace"}
    return ends.get(code, f"died with {code}"), seconds, usage.ru_maxrss * 1024


def take(way: str, folder: Path) -> int:
    """Take a way in; 0 if it got through, 1 if it was refused with a message, 2 if anything else was raised."""
    torch.set_num_threads(1)
    try:
        WAYS[way](folder)
        return 0
    except SystemExit as error:
        return 1 if error.code else 0
    except (typer.Exit, typer.BadParameter):
        return 1
    except (OSError, ValueError) as error:
        print(type(error).__name__, str(error)[:1000])
        if len(str(error)) > 6000:
            print("a message of", len(str(error)), "characters")
            return 2
        # A command says it itself
        return 1 if way in ("FSPADModel", "AutoModel", "no package", "load_adapter", "adapter") else 2
    except BaseException:
        traceback.print_exc()
        # What transformers raises before it asks any code of a head is not ours
        return 1 if way in ("AutoModel", "no package") else 2


def check(way: str, rng: random.Random, honest: Path, work: Path, most: float) -> tuple[str, str | None]:
    """Break something, take the way in, and tell how it ended and what is wrong with that, if anything."""
    folder, mark, log = work / "case", work / "mark", work / "log"
    shutil.rmtree(folder, ignore_errors=True)
    mark.unlink(missing_ok=True)
    shutil.copytree(honest, folder)
    what = rng.choice(breakers(way, mark))(rng, folder)
    ended, seconds, size = run_alone(way, folder, log)
    text = log.read_text(errors="replace")
    faults = {
        "code was run": mark.exists(),
        f"took {seconds:.1f} s": seconds > MOST_SECONDS,
        f"took {(size - most) / 2**20:.0f} MB more": size > most + MOST_BYTES,
        ended: ended not in ("accepted", "refused"),
        "printed a stack trace": "Traceback" in text and way not in ("AutoModel", "no package"),
        f"printed {len(text)} characters": len(text) > 20_000,
    }
    wrong = [fault for fault, is_there in faults.items() if is_there]
    return ended, f"{way}: {what}: {', '.join(wrong)}\n{text[-1500:]}" if wrong else None


def main() -> None:
    """Measure with honest files, and then with broken ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=list(WAYS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    work = Path(tempfile.mkdtemp(prefix="fspad-hostile-"))
    try:
        make_honest(work / "honest")
        most = {}
        for way in options.ways:
            shutil.copytree(work / "honest", work / "case", dirs_exist_ok=True)
            ended, _, most[way] = run_alone(way, work / "case", work / "log")
            expected = "refused" if way in ("no package", "adapter") else "accepted"
            if ended != expected:
                sys.exit(f"{way}: honest files were {ended}\n{(work / 'log').read_text()}")
            shutil.rmtree(work / "case")
        counts, problems = Counter(), []
        for number in range(options.count):
            way = options.ways[number % len(options.ways)]
            ended, problem = check(way, random.Random(f"{options.seed} {number}"), work / "honest", work, most[way])
            counts[way, ended] += 1
            if problem is not None:
                problems.append(problem)
                print(f"--- {number}: {problem}", flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)
    for (way, ended), count in sorted(counts.items()):
        print(f"{way:14} {ended:10} {count}")
    print(f"seed {options.seed}: {options.count} inputs, {len(problems)} problems")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
