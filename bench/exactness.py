"""Whether answers with a head are those of plain greedy decoding, near-ties aside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .measuring import Comparison

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Of scores in float32, which any forward pass over several tokens rounds in another order.
NEAR_TIE = 1e-4


@dataclass(frozen=True)
class Exactness:
    """How many answers are the same both ways.

    Args:
        identical: Answers with the same tokens.
        near_ties: Answers that differ first where the two tokens' scores are closer than `NEAR_TIE`.
        different: All others.
    """

    identical: int
    near_ties: int
    different: int

    def __str__(self) -> str:
        if self.different:
            return f"{self.different} of {self.identical + self.near_ties + self.different} answers DIFFER"
        return f"identical but for near-ties in {self.near_ties}" if self.near_ties else "identical"


def check_exactness(
    target: PreTrainedModel, prompts: Sequence[dict[str, torch.Tensor]], comparisons: Sequence[Comparison]
) -> Exactness:
    """Compare greedy answers.

    Args:
        target: The model that answered, in float32.
        prompts: `input_ids` and `attention_mask` of each prompt, of shape `(1, length)`.
        comparisons: One answer both ways to each of them.

    Returns:
        The counts.
    """
    gaps = [
        score_gap(target, inputs, comparison.plain[0].token_ids, comparison.assisted[0].token_ids)
        for inputs, comparison in zip(prompts, comparisons, strict=True)
        if not comparison.is_identical
    ]
    near_ties = sum(gap < NEAR_TIE for gap in gaps)
    return Exactness(len(comparisons) - len(gaps), near_ties, len(gaps) - near_ties)


def score_gap(
    target: PreTrainedModel, inputs: dict[str, torch.Tensor], plain: list[int], assisted: list[int]
) -> float:
    """How far apart plain greedy decoding scores the first two tokens in which answers differ.

    Args:
        target: The model.
        inputs: `input_ids` and `attention_mask` of the prompt, of shape `(1, length)`.
        plain: Tokens of the plain answer.
        assisted: Tokens of the other answer.

    Returns:
        The difference of the scores; infinite if one answer is longer and nothing else.
    """
    pairs = enumerate(zip(plain, assisted, strict=False))
    first = next((index for index, (token, other) in pairs if token != other), None)
    if first is None:
        return float("inf")
    output = target.generate(
        **inputs, max_new_tokens=first + 1, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    scores = output.scores[first][0]
    return abs(float(scores[plain[first]] - scores[assisted[first]]))
