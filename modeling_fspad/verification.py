"""Exact verification: walk down a drafted tree along the tokens that the target itself chooses."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .tree import DraftTree


@dataclass
class TokenChooser:
    """Chooses tokens as plain decoding does, one after the other, and remembers what it was asked to return.

    Drafts are deterministic, so one draw from the target's own processed distribution at each visited node is exact, and
    as it is the only draw for that token the random numbers are those of plain sampling.

    Args:
        logits_processor: Applied to the true prefix of every token, in order and once.
        stopping_criteria: Asked after every token.
        do_sample: Whether to draw from the distribution instead of taking its maximum.
        streamer: Gets every token as it is chosen.
        keep_scores: Whether to keep the processed scores of every token.
        keep_logits: Whether to keep the raw logits of every token.
    """

    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    do_sample: bool
    streamer: BaseStreamer | None = None
    keep_scores: bool = False
    keep_logits: bool = False
    scores: tuple[torch.Tensor, ...] = field(default=(), init=False)
    logits: tuple[torch.Tensor, ...] = field(default=(), init=False)

    def choose(self, input_ids: torch.LongTensor, logits: torch.Tensor) -> tuple[torch.LongTensor, bool]:
        """Choose the next token of each row.

        Args:
            input_ids: The true prefix, of shape `(batch, length)`.
            logits: The target's logits after it, of shape `(batch, vocab)`, in any float dtype.

        Returns:
            The prefix with the new token, of shape `(batch, length + 1)`, and whether plain decoding would stop here.
        """
        logits = logits.to(copy=True, dtype=torch.float32, device=input_ids.device)
        scores = self.logits_processor(input_ids, logits)
        if self.keep_scores:
            self.scores += (scores,)
        if self.keep_logits:
            self.logits += (logits,)
        if self.do_sample:
            tokens = torch.multinomial(scores.softmax(dim=-1), num_samples=1)
        else:
            tokens = scores.argmax(dim=-1, keepdim=True)
        input_ids = torch.cat([input_ids, tokens], dim=-1)
        is_done = bool(self.stopping_criteria(input_ids, self.scores if self.keep_scores else None).all())
        if self.streamer is not None:
            self.streamer.put(tokens[:, 0].cpu())
        return input_ids, is_done


def accept(
    tree: DraftTree,
    logits: torch.Tensor,
    input_ids: torch.LongTensor,
    chooser: TokenChooser,
    path: list[int],
) -> tuple[torch.LongTensor, bool]:
    """Walk down the tree from the root while the target chooses tokens that were drafted.

    The first token that no child carries is emitted as well: it is the target's own choice (the bonus token).

    Args:
        tree: The verified tree of one row.
        logits: The target's logits at its nodes, of shape `(1, nodes, vocab)`.
        input_ids: The tokens so far, ending in the root, of shape `(1, length)`.
        chooser: Chooses the tokens.
        path: Gets the nodes whose logits are used, root first. It is the caller's, who needs it too when a processor,
            a criterion or a streamer raises.

    Returns:
        The tokens with at least one more, and whether plain decoding would stop here.
    """
    edges = zip(tree.parents[0, 1:].tolist(), tree.tokens[0, 1:].tolist(), strict=True)
    child_with_token = {edge: node for node, edge in enumerate(edges, start=1)}
    node, is_done = 0, False
    while node is not None:
        path.append(node)
        input_ids, is_done = chooser.choose(input_ids, logits[:, node])
        node = None if is_done else child_with_token.get((node, int(input_ids[0, -1])))
    return input_ids, is_done
