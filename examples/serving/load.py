"""Ask a server on this machine the same questions with so many requests at a time, and print tokens/s and tau.

    python examples/serving/load.py --prompts prompts.jsonl --concurrency 1 2 4 8

Start two servers, one with a head and one without (`fspad serve --plain --port 8001`), and give both as `--urls`: they are
asked in turn, so that neither has the better moment. Only this machine is asked, and no longer than `--seconds`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Column, Table

from fspad.bench.questions import read_questions
from fspad.serving.counters import Counters, read_counters

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--urls", nargs="+", default=["http://127.0.0.1:8000"], help="Servers on this machine.")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with `prompt`, or questions.")
    parser.add_argument("--num_prompts", type=int, default=16, help="How many of them, at most 256.")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8], help="Requests at a time.")
    parser.add_argument("--max_tokens", type=int, default=64, help="Longest answer.")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy.")
    parser.add_argument("--repeats", type=int, default=3, help="How often each server is asked everything.")
    parser.add_argument("--seconds", type=float, default=540.0, help="When to stop, finished or not.")
    options = parser.parse_args()
    for url in options.urls:
        if urlsplit(url).hostname not in LOOPBACK:
            parser.error(f"expected a server on this machine ({', '.join(LOOPBACK)}), got {url}")
    if not 1 <= options.num_prompts <= 256 or not all(1 <= number <= 64 for number in options.concurrency):
        parser.error("expected 1 to 256 prompts and 1 to 64 requests at a time")
    return options


def find_model(url: str) -> str:
    """What the server calls its model."""
    with OPENER.open(f"{url}/v1/models", timeout=30) as response:
        return json.load(response)["data"][0]["id"]


def ask(url: str, model: str, prompt: str, options: argparse.Namespace) -> tuple[int, float]:
    """Ask one question.

    Args:
        url: The server.
        model: What it calls its model.
        prompt: The question.
        options: The command line.

    Returns:
        Tokens of the answer, and seconds.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    start = time.perf_counter()
    with OPENER.open(request, timeout=300) as response:
        tokens = json.load(response)["usage"]["completion_tokens"]
    return tokens, time.perf_counter() - start


def ask_all(
    url: str, prompts: list[str], concurrency: int, options: argparse.Namespace
) -> tuple[float, float, Counters]:
    """Ask all questions.

    Args:
        url: The server.
        prompts: The questions.
        concurrency: How many at a time.
        options: The command line.

    Returns:
        Tokens/s of all together, median seconds of an answer, and what the server counted.
    """
    model, before = find_model(url), read_counters(url)
    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(lambda prompt: ask(url, model, prompt, options), prompts))
    seconds = time.perf_counter() - start
    speed = sum(tokens for tokens, _ in answers) / seconds
    return speed, statistics.median(taken for _, taken in answers), read_counters(url).since(before)


def main() -> None:
    """Ask, and print the table."""
    options = parse_arguments()
    questions = read_questions(options.prompts)[: options.num_prompts]
    prompts = [question.turns[0] for question in questions]
    deadline = time.monotonic() + options.seconds
    results: dict[tuple[int, str], list[tuple[float, float, Counters]]] = {}
    console = Console()
    warm_up = [(options.concurrency[-1], url, False) for url in options.urls]
    measured = [(number, url, True) for number in options.concurrency for url in options.urls]
    for concurrency, url, counts in warm_up + measured * options.repeats:
        if time.monotonic() > deadline:
            console.print("Stopped after `--seconds`.")
            break
        result = ask_all(url, prompts, concurrency, options)
        if counts:
            results.setdefault((concurrency, url), []).append(result)
    table = Table(
        "Requests at a time", Column("Server", no_wrap=True), "Tokens/s", "Seconds an answer", "tau", title="medians"
    )
    for (concurrency, url), measured in sorted(results.items()):
        speed, seconds, counted = zip(*measured, strict=True)
        tau = statistics.median(counters.tau for counters in counted)
        row = (f"{statistics.median(speed):.1f}", f"{statistics.median(seconds):.2f}", f"{tau:.2f}")
        table.add_row(str(concurrency), url, *row)
    console.print(table)


if __name__ == "__main__":
    main()
