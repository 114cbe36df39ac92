"""A picture of a terminal: one answer of SmolLM2 plain and beside it with its head, when the faster of the two is done.

    python examples/record_demo.py            # measure, write docs/demo.json, and draw docs/demo.svg
    python examples/record_demo.py --draw     # draw docs/demo.svg again

Everything in the picture comes from the record. The machine should have nothing else to do while it is measured.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fspad import FSPADModel
from fspad.bench.machine import describe_machine
from fspad.bench.measuring import WARM_UP_TOKENS, mean_tokens_per_step, measure
from fspad.bench.questions import encode_dialogue
from fspad.bench.smollm2 import load_smollm2

HEAD = Path(__file__).parent / "heads" / "smollm2-135m-instruct"
DOCS = Path(__file__).resolve().parents[1] / "docs"
PROMPT = "What does a compiler do? Answer for somebody who has never written a program."
WIDTH = 112
BAR = 40
# Tokens of one verification step have one colour, those of the next the other
COLORS = ("cyan", "green")


def measure_answers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Answer plain and with the head in turn, and keep the run of median time of each.

    Args:
        arguments: The command line.

    Returns:
        The record: prompt, setup, and text and time of both answers.
    """
    target, tokenizer = load_smollm2(getattr(torch, arguments.dtype))
    head = FSPADModel.from_pretrained(arguments.head, dtype=target.dtype)
    inputs = encode_dialogue(tokenizer, [arguments.prompt], [], target.device)
    answers: dict[str, list[Any]] = {"plain": [], "fspad": []}
    for assistant in (None, head):
        measure(target, inputs, assistant, min(WARM_UP_TOKENS, arguments.max_new_tokens))
    for _ in range(arguments.repeats):
        for name, assistant in (("plain", None), ("fspad", head)):
            answers[name].append(measure(target, inputs, assistant, arguments.max_new_tokens))
    record = {
        "prompt": arguments.prompt,
        "target": target.name_or_path.split("/")[-1],
        "machine": describe_machine(target.device),
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    for name, runs in answers.items():
        answer = sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]
        # A token alone may be half a character, so each piece is what it adds to the text
        texts = [tokenizer.decode(answer.token_ids[:end]) for end in range(len(answer.token_ids) + 1)]
        texts = [text.rstrip("\ufffd") for text in texts]
        record[name] = {
            "pieces": [after[len(before) :] for before, after in itertools.pairwise(texts)],
            "seconds": round(answer.seconds, 3),
            "accept_lengths": answer.accept_lengths if name == "fspad" else [],
        }
    return record


def draw(record: dict[str, Any]) -> str:
    """Draw the terminal.

    Args:
        record: What `measure_answers` returned.

    Returns:
        An SVG without references to anything outside of it.
    """
    plain, assisted = record["plain"], record["fspad"]
    end = min(plain["seconds"], assisted["seconds"])
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text(record["prompt"], style="bold"), "")
    grid = Table.grid(expand=True, padding=(0, 1))
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    grid.add_row(
        _panel("target.generate(**inputs)", plain, end),
        _panel("target.generate(**inputs, assistant_model=head)", assisted, end),
    )
    console.print(grid)
    console.print(_verdict(record))
    threads = f"{record['threads']} thread{'s' if record['threads'] > 1 else ''}"
    releases = f"torch {record['torch']}, transformers {record['transformers']}"
    console.print(Text(f"{record['machine']}, {threads}, {record['dtype']}; {releases}", style="dim"))
    svg = console.export_svg(title=f"{record['target']}, after {end:.1f} seconds", unique_id="demo")
    # Fonts of other sites are not loaded where pictures are shown, and need not be asked for
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


def _panel(title: str, answer: dict[str, Any], seconds: float) -> Panel:
    """What was written after so many seconds, the time of the whole answer being spread evenly over its steps."""
    pieces, steps = answer["pieces"], [1, *answer["accept_lengths"]]
    if len(steps) == 1:
        steps = [1] * len(pieces)
    num_steps = round(len(steps) * min(1.0, seconds / answer["seconds"]))
    text, position = Text(), 0
    for number, length in enumerate(steps[:num_steps]):
        style = COLORS[number % 2] if answer["accept_lengths"] else ""
        text.append("".join(pieces[position : position + length]), style=style)
        position += length
    text = Text("\n").join(line for line in text.split("\n") if line.plain.strip())
    # As high as the other panel will be, which has the whole text
    whole = Text("".join(pieces))
    lines = [line for line in whole.split("\n") if line.plain.strip()]
    inner = WIDTH // 2 - 5
    console = Console(width=inner)
    height = sum(len(line.wrap(console, inner)) for line in lines)
    text.append("\n" * (height - sum(len(line.wrap(console, inner)) for line in text.split("\n"))))
    done = round(BAR * position / len(pieces))
    bar = Text("\n").append("━" * done, style=COLORS[1]).append("━" * (BAR - done), style="grey35")
    return Panel(Group(text, bar.append(f" {position} tokens")), title=title, title_align="left")


def _verdict(record: dict[str, Any]) -> Text:
    plain, assisted = record["plain"], record["fspad"]
    speeds = [len(answer["pieces"]) / answer["seconds"] for answer in (plain, assisted)]
    tau = mean_tokens_per_step(assisted["accept_lengths"])
    same = "the same text" if plain["pieces"] == assisted["pieces"] else "texts that part at a near-tie"
    text = Text(f"{speeds[1] / speeds[0]:.2f}x the speed", style="bold")
    text.append(f" ({speeds[0]:.1f} and {speeds[1]:.1f} tokens/s), {same}, ", style="not bold")
    return text.append(f"{tau:.2f} tokens a step of the target", style="not bold")


def main() -> None:
    """Measure unless told not to, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="draw from the record that there is")
    parser.add_argument("--record", type=Path, default=DOCS / "demo.json")
    parser.add_argument("--output", type=Path, default=DOCS / "demo.svg")
    parser.add_argument("--head", default=HEAD, help="folder or Hub id; by default the head of the checkout")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if not arguments.draw:
        record = measure_answers(arguments)
        arguments.record.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    record = json.loads(arguments.record.read_text(encoding="utf-8"))
    arguments.output.write_text(draw(record), encoding="utf-8")


if __name__ == "__main__":
    main()
