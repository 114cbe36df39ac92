"""Measure FSPAD beside what other packages offer for a target as it is: lookup of `flashspec` and of `economize`.

    pip install flashspec economize   # in an environment of its own
    python examples/compare_peers.py --questions question.jsonl

All run in turn on each question, greedily, on SmolLM2-135M-Instruct with the head of this repository. What needs a head or
a second model trained for the target (EAGLE-3, Medusa, jump drafting, draft models) is left out: there is none to be had.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedModel

from fspad import FSPADModel
from fspad.bench.questions import encode_dialogue, read_questions
from fspad.bench.smollm2 import load_smollm2

HEAD = Path(__file__).parent / "heads" / "smollm2-135m-instruct"
Generate = Callable[[torch.Tensor, int], torch.Tensor]


def of_transformers(target: PreTrainedModel, **options: object) -> Generate:
    """`generate` of the target itself, with some options."""

    def generate(input_ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        mask = torch.ones_like(input_ids)
        output = target.generate(
            input_ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens, **options
        )
        return output[0, input_ids.shape[1] :]

    return generate


def of_flashspec(target: PreTrainedModel, end_ids: list[int]) -> Generate:
    """Its lookup, as its documents set it up."""
    from flashspec import BanditConfig, FlashSpecConfig, SamplingConfig, SpeculativeEngine
    from flashspec.engine import NgramDrafter, TargetModel

    config = FlashSpecConfig(
        device="cpu",
        drafter_strategy="bandit",
        bandit=BanditConfig(n_arms=1),
        sampling=SamplingConfig(temperature=0.0),
        eos_token_ids=end_ids,
    )
    wrapped = TargetModel("target", torch.device("cpu"), target.dtype, model=target)
    engine = SpeculativeEngine(config, [NgramDrafter()], wrapped)

    def generate(input_ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        result = engine.generate(input_ids, max_new_tokens=max_new_tokens)
        return result.output_ids[0, : result.n_tokens_generated]

    return generate


def of_economize(target: PreTrainedModel) -> Generate:
    """Its lookup, with as many drafted tokens as prompt lookup of transformers."""
    import economize
    from economize.techniques.lookup import LookupConfig

    model = economize.apply(target, LookupConfig())

    def generate(input_ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        options = economize.DecodeConfig(cycle_length=11)
        output = model.generate(input_ids, max_new_tokens=max_new_tokens, decoding=options)
        return output[0, input_ids.shape[1] :]

    return generate


def main() -> None:
    """Measure, and print speedups over plain `generate`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, required=True, help="JSON-lines file in the format of Spec-Bench")
    parser.add_argument("--max_new_tokens", type=int, default=96)
    options = parser.parse_args()
    target, tokenizer = load_smollm2(torch.bfloat16)
    head = FSPADModel.from_pretrained(HEAD, dtype=target.dtype)
    methods = {
        "plain": of_transformers(target),
        "prompt lookup of transformers": of_transformers(target, prompt_lookup_num_tokens=10),
        "lookup of flashspec": of_flashspec(target, [tokenizer.eos_token_id]),
        "lookup of economize": of_economize(target),
        "FSPAD": of_transformers(target, assistant_model=head),
    }
    questions = read_questions(options.questions)
    speeds: dict[str, list[float]] = {name: [] for name in methods}
    prompts = [
        encode_dialogue(tokenizer, question.turns[:1], [], target.device)["input_ids"] for question in questions
    ]
    for generate in methods.values():
        generate(prompts[0], 16)  # warm-up
    for prompt in track(prompts):
        for name, generate in methods.items():
            start = time.perf_counter()
            length = len(generate(prompt, options.max_new_tokens))
            speeds[name].append(length / (time.perf_counter() - start))
    table = Table("Method", "Mean", "Median", "Least")
    for name, values in speeds.items():
        ratios = [value / plain for value, plain in zip(values, speeds["plain"], strict=True)]
        table.add_row(
            name, *(f"{figure:.2f}" for figure in (statistics.mean(ratios), statistics.median(ratios), min(ratios)))
        )
    Console().print(table)


if __name__ == "__main__":
    main()
