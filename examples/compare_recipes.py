"""Train SmolLM2 heads by several recipes on the same dialogues, and compare their tau.

    python examples/compare_recipes.py --output_dir recipes --dialogs dialogues.jsonl --prompts heldout.jsonl --seeds 0 1 2

Every recipe changes one thing of the baseline, FSPAD trained for one draft step. All recipes of a seed begin with the same
random numbers and see the same dialogues in the same order, for the same number of steps unless that is what they change.
Each run is saved before the next begins: the same command goes on after an interruption, and started in several processes
at once, they share the runs. At the end, and with `--only_report` at any time, the table of the runs that there are is
printed: mean tau, standard deviation over the seeds, and their number.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Column, Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fspad import FSPADConfig, FSPADModel
from fspad.bench.measuring import mean_tokens_per_step, measure
from fspad.bench.smollm2 import load_smollm2
from fspad.cli.loading import encode, read_prompts
from fspad.cli.train import load_dialogues
from fspad.trainer import FSPADTrainer, FSPADTrainingArguments
from fspad.trainer.data import count_token_frequencies, most_frequent_tokens, prepare_dataset
from fspad.trainer.features import add_features
from fspad.trainer.resumable import find_differences, write_whole


@dataclass(frozen=True)
class Recipe:
    """What a run does; the defaults are the baseline.

    Args:
        feature_sampling: Variant of the head.
        partial_alignment: Variant of the head.
        num_draft_steps: Draft steps that are trained.
        logits_loss_weight: Weight of the soft cross-entropy.
        draft_vocab_size: Tokens that the head scores; `None` for all.
        steps: Optimizer steps, relative to the baseline's.
        dialogues: Dialogues, relative to the baseline's, which sees each once; fewer are repeated.
    """

    feature_sampling: bool = True
    partial_alignment: bool = True
    num_draft_steps: int = 1
    logits_loss_weight: float = 0.1
    draft_vocab_size: int | None = 8192
    steps: float = 1.0
    dialogues: float = 1.0


RECIPES = {
    "eagle": Recipe(feature_sampling=False, partial_alignment=False),
    "feature-sampling": Recipe(partial_alignment=False),
    "partial-alignment": Recipe(feature_sampling=False),
    "fspad": Recipe(),
    "two-draft-steps": Recipe(num_draft_steps=2),
    "three-draft-steps": Recipe(num_draft_steps=3),
    "logits-weight-0.5": Recipe(logits_loss_weight=0.5),
    "logits-weight-1": Recipe(logits_loss_weight=1.0),
    "vocabulary-16k": Recipe(draft_vocab_size=16384),
    "vocabulary-full": Recipe(draft_vocab_size=None),
    "half-the-steps": Recipe(steps=0.5, dialogues=0.5),
    "twice-the-steps": Recipe(steps=2.0),
    "quarter-of-the-dialogues": Recipe(dialogues=0.25),
}


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder of features and results.")
    parser.add_argument("--dialogs", required=True, help="JSONL(.gz) or Parquet file of dialogues, in training order.")
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help="JSONL files of prompts to measure on.")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="Recipes to compare.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="Seeds of every recipe.")
    parser.add_argument(
        "--temperatures", type=float, nargs="+", default=[0.0, 1.0], help="Temperatures of the answers."
    )
    parser.add_argument("--max_new_tokens", type=int, default=64, help="Longest answer.")
    parser.add_argument("--batch_size", type=int, default=8, help="Dialogues in a batch.")
    parser.add_argument("--max_steps", type=int, default=128, help="Optimizer steps of the baseline.")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="Learning rate, of every recipe.")
    parser.add_argument("--only_report", action="store_true", help="Print the table of the runs that there are.")
    return parser.parse_args()


def train(
    recipe: Recipe,
    seed: int,
    dataset: Dataset,
    counts: torch.Tensor,
    target: PreTrainedModel,
    options: argparse.Namespace,
) -> FSPADModel:
    """Train one head.

    Args:
        recipe: How.
        seed: Seed of its weights, of the noise and of the order of the dialogues.
        dataset: Dialogues with features; the first of them are trained on.
        counts: How often the target writes each token, of shape `(vocabulary,)`.
        target: The target.
        options: The command line.

    Returns:
        The head in the target's dtype.
    """
    num_dialogues = round(recipe.dialogues * options.max_steps * options.batch_size)
    if num_dialogues > len(dataset):
        raise ValueError(f"expected at least {num_dialogues} dialogues, got {len(dataset)}: lower --max_steps")
    torch.manual_seed(seed)
    variant = {"feature_sampling": recipe.feature_sampling, "partial_alignment": recipe.partial_alignment}
    config = FSPADConfig.from_target(target.config, **variant, draft_depth=4, num_draft_tokens=16, lookup=False)
    head = FSPADModel.from_target(target, config).float()
    if recipe.draft_vocab_size is not None:
        head.set_draft_vocabulary(most_frequent_tokens(counts, recipe.draft_vocab_size))
    max_steps = round(recipe.steps * options.max_steps)
    arguments = FSPADTrainingArguments(
        output_dir=str(options.output_dir / "trainer"),
        max_steps=max_steps,
        warmup_steps=max_steps // 10,
        lr_scheduler_type="cosine",
        learning_rate=options.learning_rate,
        num_draft_steps=recipe.num_draft_steps,
        logits_loss_weight=recipe.logits_loss_weight,
        per_device_train_batch_size=options.batch_size,
        train_sampling_strategy="group_by_length",
        bf16=True,
        use_cpu=not torch.accelerator.is_available(),
        seed=seed,
        save_strategy="no",
        report_to="none",
    )
    trainer = FSPADTrainer(
        model=head, target=target, args=arguments, train_dataset=dataset.select(range(num_dialogues))
    )
    trainer.train()
    return trainer.model.to(target.dtype).eval()


def measure_tau(
    head: FSPADModel, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> list[dict]:
    """Accept lengths of every answer to every prompt.

    Args:
        head: The trained head.
        target: The target.
        tokenizer: Its tokenizer.
        options: The command line.

    Returns:
        An entry for each file of prompts and temperature.
    """
    entries = []
    for path in options.prompts:
        inputs = [encode(tokenizer, prompt, target.device) for prompt in read_prompts(path)]
        for temperature in options.temperatures:
            answers = [measure(target, prompt, head, options.max_new_tokens, temperature) for prompt in inputs]
            lengths = [length for answer in answers for length in answer.accept_lengths]
            entries.append({"prompts": path.stem, "temperature": temperature, "accept_lengths": lengths})
    return entries


def run_all(options: argparse.Namespace) -> None:
    """Do every run that nobody has done or is doing."""
    runs = [(name, seed) for seed in options.seeds for name in options.recipes]
    missing = [run for run in runs if read_result(options, *run) is None]
    if not missing:
        return
    target, tokenizer = load_smollm2(torch.bfloat16)
    prepared = prepare_dataset(load_dialogues(options.dialogs), tokenizer, 1024)
    dataset = add_features(prepared, target, options.output_dir / "features")
    counts = count_token_frequencies(prepared, target.config.vocab_size)
    for name, seed in missing:
        file = _result_file(options, name, seed)
        try:
            # Let go of by the system if the process dies
            with FileLock(file.with_suffix(".lock"), timeout=0):
                if not file.exists():
                    head = train(RECIPES[name], seed, dataset, counts, target, options)
                    taus = measure_tau(head, target, tokenizer, options)
                    write_whole(file, [json.dumps({"settings": find_settings(options, name), "measured": taus})])
        except Timeout:
            continue


def find_settings(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """What the results of a recipe depend on, apart from the seed."""
    names = ("dialogs", "prompts", "temperatures", "max_new_tokens", "batch_size", "max_steps", "learning_rate")
    settings = {name: getattr(options, name) for name in names}
    return {**settings, "prompts": [str(path) for path in options.prompts], **asdict(RECIPES[name])}


def read_result(options: argparse.Namespace, name: str, seed: int) -> list[dict] | None:
    """Read what a run has measured.

    Args:
        options: The command line.
        name: Its recipe.
        seed: Its seed.

    Returns:
        As [`measure_tau`] gives it, or `None` if there is no such run.

    Raises:
        ValueError: If it was made with other settings.
    """
    file = _result_file(options, name, seed)
    if not file.exists():
        return None
    result = json.loads(file.read_text(encoding="utf-8"))
    if differences := find_differences(result["settings"], find_settings(options, name)):
        raise ValueError(f"expected the settings of {file}, got others ({'; '.join(differences)}): use a new folder.")
    return result["measured"]


def report(options: argparse.Namespace) -> Table:
    """Mean tau of each recipe over its seeds, with the standard deviation between them.

    Args:
        options: The command line.

    Returns:
        The table.
    """
    taus: dict[str, dict[str, list[float]]] = {}
    for name in options.recipes:
        for entry in (entry for seed in options.seeds for entry in read_result(options, name, seed) or []):
            column = f"{entry['prompts']} T={entry['temperature']:g}"
            lengths = entry["accept_lengths"]
            taus.setdefault(column, {}).setdefault(name, []).append(mean_tokens_per_step(lengths))
    table = Table(Column("Recipe", no_wrap=True), *taus, title="tau")
    for name in options.recipes:
        table.add_row(name, *(_describe(column.get(name, [])) for column in taus.values()))
    return table


def _describe(taus: list[float]) -> str:
    if not taus:
        return "-"
    spread = f" ± {statistics.stdev(taus):.2f}" if len(taus) > 1 else ""
    return f"{statistics.mean(taus):.2f}{spread} ({len(taus)})"


def _result_file(options: argparse.Namespace, name: str, seed: int) -> Path:
    return options.output_dir / f"{name}-{seed}.json"


def main() -> None:
    """Run what is missing, and print the table."""
    options = parse_arguments()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    if not options.only_report:
        run_all(options)
    Console().print(report(options))


if __name__ == "__main__":
    main()
