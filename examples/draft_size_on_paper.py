"""How large a draft pays on a machine of which only the times of steps are known, on paper: nothing is run.

    python examples/draft_size_on_paper.py

The sizes are those that `num_draft_tokens="auto"` would settle on, from the same classes. What the head proposes is a model
with one number: the best guess at each node is right with probability p, and each further one takes p / 2 of what those before
it have left. Real texts are less even than that.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from fspad.automatic_size import MAX_CANDIDATES, AutomaticSize
from fspad.candidates import Candidates
from fspad.experience import Experience
from fspad.step_costs import StepCosts

TOP_K, DEPTH = 8, 5
NUM_STEPS = 300  # until the averages of the sizes have settled
MEASURED_SIZES = (1, 4, 8, 12, 16, 24, 32, 48, 64)


class KnownCosts(StepCosts):
    """Costs that are given and not learnt.

    Args:
        verify: Seconds of a verification by its number of nodes, the root included.
        level: Seconds of a level of drafting.
        knows_scores: Whether the host knows probabilities between levels; an accelerator would have to wait for them.
    """

    trial = None

    def __init__(self, verify: Callable[[int], float], level: float, knows_scores: bool):
        super().__init__()
        self.knows_scores = knows_scores
        self._seconds = {nodes: verify(nodes) for nodes in range(1, MAX_CANDIDATES + 2)}
        self._first_level = self._further_level = level


def measured(milliseconds: tuple[float, ...], level: float) -> KnownCosts:
    """Costs between measured points.

    Args:
        milliseconds: Of verifications of `MEASURED_SIZES` nodes.
        level: Milliseconds of a level.
    """
    known = StepCosts()
    known._seconds = {size: time / 1000 for size, time in zip(MEASURED_SIZES, milliseconds, strict=True)}
    return KnownCosts(known.verify, level / 1000, knows_scores=True)


def roofline(params: float, bandwidth: float, flops: float, level: float) -> KnownCosts:
    """Costs of a target in 16 bits whose weights are read once a step, or whose products take longer than that.

    Args:
        params: Number of weights.
        bandwidth: Bytes per second.
        flops: Floating-point operations per second.
        level: Milliseconds of a level.
    """

    def verify(nodes: int) -> float:
        return max(2 * params / bandwidth, 2 * params * nodes / flops)

    return KnownCosts(verify, level / 1000, knows_scores=False)


MACHINES = {
    "2 CPU cores, SmolLM2-135M, bf16": measured((32, 37, 39, 40, 43, 50, 55, 66, 101), level=3.6),
    "2 CPU cores, SmolLM2-135M, fp32": measured((40, 70, 70, 75, 84, 97, 107, 132, 180), level=6.8),
    "GPU on paper, 8B, levels of 0.5 ms": roofline(8e9, 3.35e12, 790e12, level=0.5),
    "GPU on paper, 8B, levels of 2 ms": roofline(8e9, 3.35e12, 790e12, level=2.0),
}


def draft(size: AutomaticSize, best: float, knows_scores: bool) -> tuple[Candidates, int]:
    """Let the size decide how many levels are drafted, each from the best nodes of the one before.

    Args:
        size: Decides.
        best: The probability that the best guess at a node is right.
        knows_scores: Whether it knows probabilities between levels.

    Returns:
        The candidates and the number of levels.
    """
    candidates, frontier, levels = Candidates(0), [0], 0
    left = [math.log1p(-best) + k * math.log1p(-best / 2) for k in range(TOP_K - 1)]
    guesses = [math.log(best), *(chance + math.log(best / 2) for chance in left)]
    size.begin()
    while size.wants_level(
        candidates, levels, [candidates.scores[node] for node in frontier] if levels and knows_scores else None
    ):
        nodes = [
            candidates.add(node, token, candidates.scores[node] + chance)
            for node in frontier
            for token, chance in enumerate(guesses)
        ]
        frontier = sorted(nodes, key=lambda node: -candidates.scores[node])[:TOP_K]
        levels += 1
    best_nodes = sorted(candidates.ranking()[: size.max_candidates])
    kept = Candidates(0)
    for node, parent in zip(best_nodes, candidates.select(best_nodes)[1][1:], strict=True):
        kept.add(parent, candidates.tokens[node], candidates.scores[node])
    return kept, levels


def settle(costs: KnownCosts, best: float) -> tuple[float, float, float, float]:
    """Decode on paper until the size has settled.

    Args:
        costs: The machine.
        best: The probability that the best guess at a node is right.

    Returns:
        Drafted tokens that are verified, levels, tokens a step and speedup, as means of the last half of the steps.
    """
    size, history = AutomaticSize(costs, Experience(), DEPTH), []
    for _ in range(NUM_STEPS):
        candidates, levels = draft(size, best, costs.knows_scores)
        nodes = size.choose(candidates)
        tokens = 1 + candidates.expected_tokens(nodes)[-1]
        verify, drafting = costs.verify(len(nodes) + 1), costs.draft(levels)
        history.append((len(nodes), levels, tokens, verify + drafting))
        size.end(len(nodes) + 1, tokens, drafting, verify)
    history = history[NUM_STEPS // 2 :]
    num_nodes, num_levels, tokens, seconds = (sum(column) / len(history) for column in zip(*history, strict=True))
    return num_nodes, num_levels, tokens, tokens / seconds * costs.verify(1)


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--know_scores", action="store_true", help="as if accelerators too knew probabilities between levels"
    )
    know_scores = parser.parse_args().know_scores
    print("| Machine | p | Drafted tokens verified | Levels | Tokens a step | Speedup |\n|---|---|---|---|---|---|")
    for name, costs in MACHINES.items():
        costs.knows_scores |= know_scores
        for best in (0.1, 0.3, 0.5, 0.7, 0.9):
            num_nodes, num_levels, tokens, speedup = settle(costs, best)
            print(f"| {name} | {best} | {num_nodes:.0f} | {num_levels:.1f} | {tokens:.2f} | {speedup:.2f} |")


if __name__ == "__main__":
    main()
