"""Acceptance: walk down a verified tree along the tokens that the target itself chooses."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from .sampling_noise import SamplingNoise, generator_state, set_generator_state
from .tree import DraftTree

# Processors that may also be asked about tokens which are never emitted: they keep no state, and wait for no device
STATELESS_PROCESSORS = {
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
}


@dataclass
class Accepted:
    """What one verification emits.

    Args:
        path: Nodes whose logits are used, root first: as many as tokens are emitted.
        input_ids: All tokens so far, of shape `(1, length)`.
        token_ids: The emitted tokens; the last one is the target's own choice that no child carries (the bonus token).
        is_done: Whether plain decoding would stop here.
        nodes: The path as a tensor on the device of the logits, of shape `(emitted,)`.
        error: What a processor, criterion or streamer has raised on the way, for the caller to raise again when the
            target's cache is whole.
    """

    path: list[int]
    input_ids: torch.LongTensor
    token_ids: list[int]
    is_done: bool
    nodes: torch.LongTensor
    error: BaseException | None = None


@dataclass
class TokenChooser:
    """Chooses tokens as plain decoding does, one after the other, and remembers what it was asked to return.

    Each token is drawn once, from the target's own processed distribution after the true prefix and with the random numbers
    that plain sampling would use. So it is the token of plain sampling, whatever was drafted, and however.

    Args:
        logits_processor: Applied to the true prefix of every token, in order and once.
        stopping_criteria: Asked after every token.
        do_sample: Whether to draw from the distribution instead of taking its maximum.
        streamer: Gets every token as it is chosen.
        keep_scores: Whether to keep the processed scores of every token.
        keep_logits: Whether to keep the raw logits of every token.
        noise: Knows random numbers that drafting has foreseen.
    """

    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    do_sample: bool
    streamer: BaseStreamer | None = None
    keep_scores: bool = False
    keep_logits: bool = False
    noise: SamplingNoise | None = None
    scores: tuple[torch.Tensor, ...] = field(default=(), init=False)
    logits: tuple[torch.Tensor, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        # Here and not while decoding, since a look at them makes an accelerator wait
        criteria = [criterion for criterion in self.stopping_criteria if isinstance(criterion, EosTokenCriteria)]
        self._end_ids = {token for criterion in criteria for token in criterion.eos_token_id.tolist()}

    def choose(self, input_ids: torch.LongTensor, logits: torch.Tensor) -> torch.LongTensor:
        """Choose the next token of each row.

        Args:
            input_ids: The true prefix, of shape `(batch, length)`.
            logits: The target's logits after it, of shape `(batch, vocab)`, in any float dtype.

        Returns:
            The tokens, of shape `(batch, 1)`.
        """
        logits = logits.to(copy=True, dtype=torch.float32, device=input_ids.device)
        scores = self.logits_processor(input_ids, logits)
        if self.keep_scores:
            self.scores += (scores,)
        if self.keep_logits:
            self.logits += (logits,)
        if self.do_sample:
            probabilities = scores.softmax(dim=-1)
            if self.noise is not None:
                return self.noise.draw(probabilities)
            return torch.multinomial(probabilities, num_samples=1)
        return scores.argmax(dim=-1, keepdim=True)

    def emit(self, input_ids: torch.LongTensor, tokens: torch.LongTensor) -> tuple[torch.LongTensor, bool]:
        """Append chosen tokens, show them to the streamer, and ask whether plain decoding would stop.

        Args:
            input_ids: The prefix, of shape `(batch, length)`.
            tokens: The tokens, of shape `(batch, 1)`.

        Returns:
            The prefix with the tokens, of shape `(batch, length + 1)`, and whether to stop.
        """
        input_ids = torch.cat([input_ids, tokens], dim=-1)
        is_done = bool(self.stopping_criteria(input_ids, self.scores if self.keep_scores else None).all())
        if self.streamer is not None:
            self.streamer.put(tokens[:, 0].cpu())
        return input_ids, is_done

    @property
    def can_run_ahead(self) -> bool:
        """Whether tokens may be chosen that are taken back, and be looked at only when all are chosen."""
        return (
            self.streamer is None
            and all(type(processor) in STATELESS_PROCESSORS for processor in self.logits_processor)
            and all(type(criterion) in (MaxLengthCriteria, EosTokenCriteria) for criterion in self.stopping_criteria)
        )

    def stops_at(self, token_ids: list[int], length: int) -> int | None:
        """The first of some tokens at which plain decoding would stop. Only for a chooser that can run ahead.

        Args:
            token_ids: New tokens.
            length: Number of tokens before them.

        Returns:
            Its index, or `None`.
        """
        limit = self.stopping_criteria.max_length
        for index, token in enumerate(token_ids):
            if token in self._end_ids or (limit is not None and length + index + 1 >= limit):
                return index
        return None


def accept(tree: DraftTree, logits: torch.Tensor, input_ids: torch.LongTensor, chooser: TokenChooser) -> Accepted:
    """Walk down the tree from the root while the target chooses tokens that were drafted.

    Args:
        tree: The verified tree of one row.
        logits: The target's logits at its nodes, of shape `(1, nodes, vocab)`.
        input_ids: The tokens so far, ending in the root, of shape `(1, length)`.
        chooser: Chooses the tokens.

    Returns:
        At least one emitted token, and the nodes that led to it.
    """
    # On an accelerator every look at a token waits for the device
    walk = _walk_ahead if logits.device.type != "cpu" and chooser.can_run_ahead else _walk
    return walk(tree, logits, input_ids, chooser)


def _walk(tree: DraftTree, logits: torch.Tensor, input_ids: torch.LongTensor, chooser: TokenChooser) -> Accepted:
    """Choose token by token, and follow each at once."""
    edges = zip(tree.parent_lists[0][1:], tree.token_lists[0][1:], strict=True)
    child_with_token = {edge: node for node, edge in enumerate(edges, start=1)}
    path, token_ids, node, is_done, error = [], [], 0, False, None
    try:
        while node is not None:
            path.append(node)
            tokens = chooser.choose(input_ids, logits[:, node])
            input_ids, is_done = chooser.emit(input_ids, tokens)
            token_ids.append(int(tokens))
            node = None if is_done else child_with_token.get((node, token_ids[-1]))
    except BaseException as raised:  # even an interruption must not leave rejected drafts in a cache of the user's
        error = raised
    return Accepted(path, input_ids, token_ids, is_done, torch.tensor(path, device=logits.device), error)


def _walk_ahead(tree: DraftTree, logits: torch.Tensor, input_ids: torch.LongTensor, chooser: TokenChooser) -> Accepted:
    """Choose as many tokens as the tree is deep without a look at any of them, and take back those that were too many.

    The host waits for the device once. Random numbers that were drawn for tokens which are taken back are given back too.
    """
    start, num_scores, num_logits = input_ids.shape[1], len(chooser.scores), len(chooser.logits)
    generator_states: list[torch.Tensor] = []
    try:
        input_ids, steps = _choose_ahead(tree, logits, input_ids, chooser, generator_states)
        token_ids, path, is_real = (list(column) for column in zip(*steps.tolist(), strict=True))
    except BaseException as raised:  # an interruption, as above; of the tokens none is known
        return Accepted([0], input_ids, [], False, torch.zeros(1, dtype=torch.long, device=logits.device), raised)
    emitted = sum(is_real)
    stop = chooser.stops_at(token_ids[:emitted], start)
    emitted = emitted if stop is None else stop + 1
    if emitted < len(generator_states):
        set_generator_state(input_ids.device, generator_states[emitted])
    chooser.scores = chooser.scores[: num_scores + emitted]
    chooser.logits = chooser.logits[: num_logits + emitted]
    return Accepted(
        path[:emitted], input_ids[:, : start + emitted], token_ids[:emitted], stop is not None, steps[:emitted, 1]
    )


def _choose_ahead(
    tree: DraftTree,
    logits: torch.Tensor,
    input_ids: torch.LongTensor,
    chooser: TokenChooser,
    generator_states: list[torch.Tensor],
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """All tokens so far and those chosen, and for each of these, of shape `(chosen, 3)`: itself, its node, if it is real."""
    tokens, parents = tree.tokens.to(logits.device), tree.parents.to(logits.device)
    is_draft = torch.arange(tree.num_nodes, device=logits.device) > 0
    node = torch.zeros(1, 1, dtype=torch.long, device=logits.device)  # (1, 1)
    on_path = torch.ones_like(node, dtype=torch.bool)
    report = []
    for _ in range(_depth(tree) + 1):
        if chooser.do_sample:
            generator_states.append(generator_state(input_ids.device))
        here = logits.gather(1, node[..., None].expand(-1, -1, logits.shape[-1]))[:, 0]
        chosen = chooser.choose(input_ids, here)
        input_ids = torch.cat([input_ids, chosen], dim=-1)
        report.append(torch.cat([chosen.to(node.device), node, on_path.long()], dim=1))
        is_child = (parents == node) & (tokens == report[-1][:, :1]) & is_draft  # (1, nodes)
        on_path = on_path & is_child.any(dim=1, keepdim=True)
        node = is_child.long().argmax(dim=1, keepdim=True)
    return input_ids, torch.cat(report)


def _depth(tree: DraftTree) -> int:
    depths = [0]
    for parent in tree.parent_lists[0][1:]:
        depths.append(depths[parent] + 1)
    return max(depths)
