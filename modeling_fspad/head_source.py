"""The head as a source of drafts: its own cache, and the growth of the dynamic tree of EAGLE-2 (arXiv 2406.16858)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from .candidates import Candidates
from .draft_size import DraftSize
from .draft_source import DraftSource, Emitted
from .drafted_nodes import DraftedNodes, Node, Opinions, propose_nodes
from .experience import experience_of
from .packed_linear import packed
from .sampling_noise import SamplingNoise
from .target import LMHead, embed_tokens
from .tree_attention import additive_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .modeling_fspad import FSPADModel

# Laying out the weights for the processor takes as long as it saves in about so many runs
RUNS_BEFORE_PACKING = 8


@dataclass
class _Frontier:
    """The nodes that are expanded next, `width` of them a row."""

    tokens: torch.LongTensor  # (batch, width)
    features: torch.FloatTensor  # (batch, width, hidden)
    scores: torch.FloatTensor  # (batch, width), cumulative log-probabilities
    indices: torch.LongTensor  # (batch, width), among all drafted nodes
    visible: torch.BoolTensor  # (batch, width, rows drafted so far and this level), what each node attends to


class HeadSource(DraftSource):
    """Drafts with the head.

    A head with a trimmed vocabulary also scores the tokens of the prompt, however rare they are elsewhere: names, foreign
    words and numbers are what a text copies from its prompt.

    Args:
        head: The FSPAD head, in evaluation mode.
        target: The model that it assists.
        top_k: Nodes expanded at each level, and children of each; 1 makes the tree a chain.
        prompt_ids: Token ids of the prompt, of shape `(batch, length)`.
        noise: The noise that the target will sample with, to draft with the same; `None` for greedy decoding.
    """

    def __init__(
        self,
        head: FSPADModel,
        target: PreTrainedModel,
        top_k: int,
        prompt_ids: torch.LongTensor,
        noise: SamplingNoise | None = None,
    ):
        self.head = head
        self.target = target
        self.top_k = top_k
        self.noise = noise
        self.lm_head = LMHead(target, _with_prompt(head.active_draft_vocab_ids, prompt_ids))
        # Decisions between levels need a look at the scores, for which an accelerator would have to wait
        self.looks_between_levels = self.lm_head.device.type == "cpu"
        self.cache = DynamicCache()
        self.padding_mask: torch.Tensor | None = None
        experience = experience_of(head, target, noise is not None)
        self.calibration, self.agreement = experience.calibration, experience.agreement
        self._pending: list[Emitted] = []
        self._num_runs = 0
        self._drafted: list[list[Node]] = []
        self._pooled: list[list[Opinions]] = []

    def extend(self, emitted: Emitted) -> None:
        """Judge the last draft, and keep what was emitted until the head is asked again, which then takes it in at once."""
        for drafted, token_ids in zip(self._drafted, emitted.token_ids, strict=False):
            self.calibration.learn(drafted, token_ids)
        for pooled, token_ids in zip(self._pooled, emitted.token_ids, strict=False):
            for token, before, said in pooled:
                self.agreement.learn(before, said, token == token_ids[0])
        self._drafted, self._pooled = [], []
        self._pending.append(emitted)

    def propose(self, candidates: list[Candidates], size: DraftSize, max_depth: int) -> None:
        """Draft level by level while that is worth its time, and propose the best nodes."""
        if max_depth <= 0 or not self._is_wanted(candidates, size, 0, None):
            return
        self._catch_up()
        if self.noise is not None:
            self.noise.begin()
        nodes = DraftedNodes()
        frontier = self._first_level(nodes)
        for level in range(1, max_depth):
            if not self._is_wanted(candidates, size, level, frontier.scores):
                break
            if self.looks_between_levels and not nodes.can_improve(frontier.scores, size.max_candidates):
                break
            frontier = self._next_level(nodes, frontier, level)
        self.cache.crop(-(frontier.visible.shape[-1] - frontier.visible.shape[1]))
        self._drafted = nodes.best(size.max_candidates)
        calibration = self.calibration if size.is_automatic else None
        self._pooled = [
            propose_nodes(row, drafted, calibration, self.agreement)
            for row, drafted in zip(candidates, self._drafted, strict=True)
        ]

    def _is_wanted(
        self, candidates: list[Candidates], size: DraftSize, level: int, scores: torch.Tensor | None
    ) -> bool:
        looks = scores is not None and (self.looks_between_levels or size.needs_scores)
        rows = [None] * len(candidates)
        if looks:
            correction = self.calibration.correction(level) if size.is_automatic else 0.0
            rows = [[score + correction for score in own] for own in scores.tolist()]
        return any(size.wants_level(row, level, own) for row, own in zip(candidates, rows, strict=True))

    def _catch_up(self) -> None:
        """Take in true features of the target, which replace whatever was drafted for their positions."""
        if not self._pending:
            return
        features, next_embeds, position_ids = (
            torch.cat([getattr(emitted, name) for emitted in self._pending], dim=1)
            for name in ("features", "next_embeds", "position_ids")
        )
        masks = [emitted.padding_mask for emitted in self._pending]
        if self.padding_mask is not None or any(mask is not None for mask in masks):
            if self.padding_mask is None:
                self.padding_mask = position_ids.new_ones(features.shape[0], self.cache.get_seq_length())
            new = [
                torch.ones_like(emitted.position_ids) if mask is None else mask.to(position_ids)
                for emitted, mask in zip(self._pending, masks, strict=True)
            ]
            self.padding_mask = torch.cat([self.padding_mask, *new], dim=1)
        self._pending = []
        predict, regress = self._run_head(features, next_embeds, position_ids, self._causal_mask(features.shape[1]))
        self.last_predict, self.last_regress = predict[:, -1:], regress[:, -1:]
        self.last_position = position_ids[:, -1:]

    def _first_level(self, nodes: DraftedNodes) -> _Frontier:
        tokens, scores = self._best_children(self.last_predict, 0)  # (batch, 1, top_k)
        tokens, scores = tokens[:, 0], scores[:, 0]
        nodes.add_level(tokens, torch.full_like(tokens, -1), scores)
        batch, width = tokens.shape
        return _Frontier(
            tokens=tokens,
            features=self.last_regress.expand(-1, width, -1),
            scores=scores,
            indices=torch.arange(width, device=tokens.device).expand(batch, -1),
            visible=torch.eye(width, dtype=torch.bool, device=tokens.device).expand(batch, -1, -1),
        )

    def _next_level(self, nodes: DraftedNodes, frontier: _Frontier, level: int) -> _Frontier:
        """Expand every node of the frontier, and make the best of the children the next frontier."""
        batch, width = frontier.tokens.shape
        embeds = embed_tokens(self.target, frontier.tokens)
        position_ids = (self.last_position.to(frontier.tokens.device) + level).expand(-1, width)
        predict, regress = self._run_head(frontier.features, embeds, position_ids, self._tree_mask(frontier.visible))
        tokens, log_probs = self._best_children(predict, level)  # (batch, width, top_k)
        top_k = tokens.shape[-1]
        scores = (frontier.scores[..., None] + log_probs).flatten(1)  # (batch, width * top_k)
        tokens = tokens.flatten(1)
        first = nodes.add_level(tokens, frontier.indices.repeat_interleave(top_k, dim=1), scores)

        best = scores.topk(min(self.top_k, scores.shape[1]), dim=1)
        from_parent = best.indices // top_k  # (batch, new width)

        def of_parents(values: torch.Tensor) -> torch.Tensor:
            return values.gather(1, from_parent[..., None].expand(-1, -1, values.shape[-1]))

        own = torch.eye(best.indices.shape[1], dtype=torch.bool, device=tokens.device).expand(batch, -1, -1)
        return _Frontier(
            tokens=tokens.gather(1, best.indices),
            features=of_parents(regress),
            scores=best.values,
            indices=first + best.indices,
            visible=torch.cat([of_parents(frontier.visible), own], dim=-1),
        )

    def _best_children(self, predict: torch.Tensor, level: int) -> tuple[torch.LongTensor, torch.FloatTensor]:
        """The `top_k` best tokens and their log-probabilities, of shape `(batch, length, top_k)` each."""
        logits, columns = self.lm_head(predict).float(), None
        if self.noise is not None:
            logits, columns = self.noise.perturb(logits, self.lm_head.token_ids, level)
        top = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1)
        log_probs = top.values - logits.logsumexp(dim=-1, keepdim=True)
        tokens = top.indices if columns is None else columns.gather(-1, top.indices)
        if self.lm_head.token_ids is not None:
            tokens = self.lm_head.token_ids[tokens]
        # Rounding may lift a probability above 1, and no child may score above its parent
        return tokens, log_probs.clamp(max=0.0)

    def _run_head(
        self,
        features: torch.Tensor,
        next_embeds: torch.Tensor,
        position_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`predict` and `regress` of the head, on the device of the LM head, where drafts are scored and chosen."""
        if self._num_runs == RUNS_BEFORE_PACKING:
            self.head = packed(self.head)
            self.lm_head.pack()
        self._num_runs += 1
        device, dtype = self.head.device, self.head.dtype
        output = self.head(
            features=features.to(device=device, dtype=dtype),
            inputs_embeds=next_embeds.to(device=device, dtype=dtype),
            position_ids=position_ids.to(device),
            attention_mask=None if attention_mask is None else attention_mask.to(device),
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.predict.to(self.lm_head.device), output.regress.to(self.lm_head.device)

    def _causal_mask(self, length: int) -> torch.Tensor | None:
        """Additive mask of shape `(batch, 1, length, true positions)`; `None` without padding, where the head makes its own.

        Not left to transformers, which looks at the padding, and makes an accelerator wait for that.
        """
        if self.padding_mask is None:
            return None
        num_positions = self.padding_mask.shape[1]
        causal = self.padding_mask.new_ones(length, num_positions, dtype=torch.bool).tril(num_positions - length)
        return additive_mask(causal & self.padding_mask[:, None].bool(), self.head.dtype)

    def _tree_mask(self, visible: torch.BoolTensor) -> torch.Tensor:
        """Additive mask of shape `(batch, 1, width, true positions + drafted rows)` in the head's dtype."""
        batch, width, num_rows = visible.shape
        num_true = self.cache.get_seq_length() - (num_rows - width)
        if self.padding_mask is None:
            true_positions = visible.new_ones(batch, width, num_true)
        else:
            true_positions = self.padding_mask.bool()[:, None].expand(-1, width, -1).to(visible.device)
        return additive_mask(torch.cat([true_positions, visible], dim=-1), self.head.dtype)


def _with_prompt(vocab_ids: torch.LongTensor | None, prompt_ids: torch.LongTensor) -> torch.LongTensor | None:
    """The draft vocabulary and those tokens of the prompt that are not in it; `None` for all tokens."""
    if vocab_ids is None:
        return None
    prompt_ids = prompt_ids.to(vocab_ids.device).unique()
    return torch.cat([vocab_ids, prompt_ids[~torch.isin(prompt_ids, vocab_ids)]])
