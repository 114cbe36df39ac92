"""Decodes for a while in four threads, plainly and with two heads, and checks every text and the memory.

    python tests/soak.py --minutes 60 --seed 0

Prints one line, and ends with code 1 if a text differed, a call failed, memory grew or something was left on a target.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import threading
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import transformers

from families.cases import compare, run
from helpers.models import make_head, make_target

NUM_THREADS = 4
NUM_HEADS = 2
VOCAB_SIZE = 9  # so few tokens that a random head guesses some of them
MOST_GROWTH = 0.02
MOST_NEAR_TIES = 0.001
SAMPLE_SECONDS = 2.0
FAMILIES = {
    "llama": {},
    "qwen3": {},
    "gemma3": {},
    "gpt2": {},
    "mixtral": {},
    "llama, trimmed": {"draft_vocab_size": 6},
}


@dataclass
class Soak:
    """What all threads share.

    Args:
        seed: Seed of models, prompts and options.
        deadline: When to stop, as `time.monotonic` counts.
    """

    seed: int
    deadline: float
    counts: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    # Random numbers of the CPU are the process's: calls that draw take turns, beside any number of calls that do not
    drawing: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.pairs = []
        for name, head_options in FAMILIES.items():
            target = make_target(name.partition(",")[0], seed=self.seed, vocab_size=VOCAB_SIZE)
            heads = [make_head(target, seed=self.seed + i, **head_options) for i in range(NUM_HEADS)]
            self.pairs.append((name, target, heads))

    def work(self, thread: int) -> None:
        """Decode until the deadline.

        Args:
            thread: Number of the thread.
        """
        rng = random.Random(f"{self.seed} {thread}")
        while time.monotonic() < self.deadline:
            name, target, heads = rng.choice(self.pairs)
            options, head, seed = random_options(rng), rng.choice(heads), rng.randrange(2**31)
            try:
                outcome, detail = self._decode(target, head, options, seed)
            except Exception as error:
                outcome, detail = "crashed", repr(error)
            self.counts[outcome] += 1
            if outcome not in ("identical", "near tie", "failed alike"):
                shown = {key: value.tolist() if torch.is_tensor(value) else value for key, value in options.items()}
                self.problems.append(f"{outcome}: {name}, seed {seed}, {shown}: {detail}")

    def _decode(self, target: Any, head: Any, options: dict[str, Any], seed: int) -> tuple[str, str]:
        if options["do_sample"]:
            with self.drawing:
                plain, ours = (attempt(target, options, assistant, seed) for assistant in (None, head))
        else:
            # Without a seed, which would disturb the calls that draw
            plain, ours = (attempt(target, options, assistant, seed=None) for assistant in (None, head))
        if isinstance(plain, str) or isinstance(ours, str):
            return ("failed alike", "") if plain == ours else ("different", f"{plain} against {ours}")
        self.counts["tokens"] += len(plain.scores)
        self.counts["steps"] += len(ours.accept_lengths)
        return compare(plain, ours)


def attempt(target: Any, options: dict[str, Any], head: Any, seed: int | None) -> Any:
    """What `generate` returns, or with what it fails: processors may forbid every token of so small a vocabulary."""
    try:
        return run(target, options, head, seed)
    except RuntimeError as error:
        return repr(error)


def random_options(rng: random.Random) -> dict[str, Any]:
    """A prompt and options of `generate`.

    Args:
        rng: Where they come from.
    """
    length, padding = rng.randint(1, 40), rng.choice((0, 0, rng.randint(1, 6)))
    tokens = [0] * padding + [rng.randrange(VOCAB_SIZE) for _ in range(length)]
    options: dict[str, Any] = {
        "input_ids": torch.tensor([tokens]),
        "attention_mask": torch.tensor([[0] * padding + [1] * length]),
        "max_new_tokens": rng.randint(1, 40),
        "do_sample": rng.random() < 0.4,
        "suppress_tokens": None,
    }
    choices: dict[str, Any] = {
        "eos_token_id": rng.randrange(VOCAB_SIZE),
        "repetition_penalty": rng.uniform(1.0, 1.5),
        "no_repeat_ngram_size": rng.randint(2, 4),
        "min_new_tokens": rng.randint(1, 10),
        "num_assistant_tokens": rng.randint(1, 30),
        "prefill_chunk_size": rng.randint(1, 9),
        "output_logits": True,
        "output_hidden_states": True,
    }
    if options["do_sample"]:
        choices |= {"temperature": rng.uniform(0.3, 2.0), "top_k": rng.randint(1, 9), "top_p": rng.uniform(0.3, 1.0)}
    chosen = {name: value for name, value in choices.items() if rng.random() < 0.25}
    return options | chosen


def resident_mib() -> float:
    """Memory that the process has in use, in MiB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def leftovers(soak: Soak) -> list[str]:
    """Hooks that calls have left behind; transformers leaves its own on decoder layers."""
    return [
        f"a hook is left on the LM head of {name}"
        for name, target, _ in soak.pairs
        if target.get_output_embeddings()._forward_pre_hooks
    ]


def main() -> None:
    """Run, print one line, and exit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    start = time.monotonic()
    soak = Soak(arguments.seed, start + 60 * arguments.minutes)
    threads = [threading.Thread(target=soak.work, args=(i,)) for i in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    sizes = []
    while time.monotonic() < soak.deadline:
        time.sleep(min(SAMPLE_SECONDS, arguments.minutes))
        sizes.append(resident_mib())
    for thread in threads:
        thread.join()
    # The first quarter warms up; the second is compared with the last
    quarter = max(1, len(sizes) // 4)
    before, after = statistics.median(sizes[quarter : 2 * quarter] or sizes), statistics.median(sizes[-quarter:])
    growth = after / before - 1
    counts = soak.counts
    calls = sum(counts[name] for name in ("identical", "failed alike", "near tie", "different", "crashed"))
    problems = soak.problems + leftovers(soak)
    if growth > MOST_GROWTH:
        problems.append(f"memory grew by {growth:.1%}")
    if counts["near tie"] > MOST_NEAR_TIES * calls + 1:
        problems.append("too many near ties")
    for problem in problems[:20]:
        print(problem, file=sys.stderr)
    print(
        f"soak {'failed' if problems or not calls else 'passed'}: {(time.monotonic() - start) / 60:.1f} min, "
        f"{calls} calls, {counts['tokens']} tokens, {counts['steps']} steps, {counts['identical']} identical, "
        f"{counts['failed alike']} failed alike, {counts['near tie']} near ties, {counts['different']} different, {counts['crashed']} crashed, "
        f"RSS {before:.0f} to {after:.0f} MiB ({growth:+.1%})"
    )
    sys.exit(bool(problems) or not calls)


if __name__ == "__main__":
    main()
