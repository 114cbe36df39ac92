"""A metric for `evaluate`: how much of what a head drafts its target accepts.

`evaluate.load` takes the path of this file, which therefore imports nothing of its package.
"""

import datasets
import evaluate

_DESCRIPTION = """
How much of what a head drafts its target accepts in speculative decoding: the mean number of tokens that a verification
step emits (tau), and how deep the accepted drafts reach.
"""

_INPUTS_DESCRIPTION = """
Args:
    predictions: For each answer, the tokens that each verification step emitted, the target's own (bonus) token
        included, as in `accept_lengths` of the output of `generate`. Zeros are the padding of a batch, and no steps.
    ranks: Optional, for any number of tokens how many the head finds more probable than the one that is the target's
        choice; 0 where the two agree.
    top_k: The k of the top-k accuracies that are computed from `ranks`.

Returns:
    A dict with

    - `tau`: All emitted tokens by all steps; 1.0, as in plain decoding, when there was no step.
    - `acceptance_by_depth`: A list whose first value is the share of steps that accepted a drafted token, whose second is
      the share of steps that accepted two in a row, and so on to the deepest draft that was accepted. They are shares of
      all steps, not of those that got as far as the depth before, and add up to `tau - 1`.
    - `accuracy_top_1` and so on: With `ranks`, the share of tokens that are among the k most probable ones of the head,
      which is what a tree of drafts with k branches needs; 0.0 when `ranks` is empty.

Raises:
    ValueError: If an accept length or a rank is negative, or k is not positive.
"""

_CITATION = """
@misc{gui2024boosting,
  title = {Boosting Lossless Speculative Decoding via Feature Sampling and Partial Alignment Distillation},
  author = {Gui, Lujun and Xiao, Bin and Su, Lei and Chen, Weipeng},
  eprint = {2408.15562},
  archivePrefix = {arXiv},
  year = {2024}
}
"""


class DraftAcceptance(evaluate.Metric):
    """tau, acceptance by depth, and top-k accuracy of a draft head.

    With `keep_in_memory=True` no file is written, so that any number of processes and threads may compute at once.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.List(datasets.Value("int64"))}),
        )

    def _compute(
        self,
        predictions: list[list[int]],
        ranks: list[int] | None = None,
        top_k: tuple[int, ...] = (1, 5),
    ) -> dict[str, float | list[float]]:
        lengths = [length for answer in predictions for length in answer if length != 0]
        _check_at_least("accept lengths", lengths, 0)
        depths = range(1, max(lengths, default=1))
        results: dict[str, float | list[float]] = {
            "tau": sum(lengths) / len(lengths) if lengths else 1.0,
            "acceptance_by_depth": [sum(length > depth for length in lengths) / len(lengths) for depth in depths],
        }
        if ranks is not None:
            ranks = [int(rank) for rank in ranks]
            _check_at_least("ranks", ranks, 0)
            _check_at_least("top_k", top_k, 1)
            for k in top_k:
                results[f"accuracy_top_{k}"] = sum(rank < k for rank in ranks) / max(1, len(ranks))
        return results


def _check_at_least(name: str, values: list[int] | tuple[int, ...], smallest: int) -> None:
    if values and min(values) < smallest:
        raise ValueError(f"expected {name} of at least {smallest}, got {min(values)}")
