"""Drafting: the head's own cache, and the growth of the dynamic tree of EAGLE-2 (arXiv 2406.16858)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from .target import LMHead, embed_tokens
from .tree import DraftedNodes, DraftTree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .modeling_fspad import FSPADModel


@dataclass
class DraftingKnobs:
    """How large a draft may be.

    Args:
        depth: Levels that are expanded after the first.
        top_k: Nodes expanded at each level, and children of each; 1 makes the tree a chain.
        num_draft_tokens: Tokens to verify, the root not counted.
        confidence_threshold: Stop when the best path of the last level is less probable than this; `None` for never.
    """

    depth: int
    top_k: int
    num_draft_tokens: int
    confidence_threshold: float | None = None


@dataclass
class _Frontier:
    """The nodes that are expanded next, `width` of them a row."""

    tokens: torch.LongTensor  # (batch, width)
    features: torch.FloatTensor  # (batch, width, hidden)
    scores: torch.FloatTensor  # (batch, width), cumulative log-probabilities
    indices: torch.LongTensor  # (batch, width), among all drafted nodes
    visible: torch.BoolTensor  # (batch, width, rows drafted so far and this level), what each node attends to


class Drafter:
    """Drafts trees for one call of `generate`. Nothing of its state is kept on head or target.

    A head with a trimmed vocabulary also scores the tokens of the prompt, however rare they are elsewhere: names, foreign
    words and numbers are what a text copies from its prompt.

    Args:
        head: The FSPAD head.
        target: The model that it assists.
        knobs: Size of the drafts.
        prompt_ids: Token ids of the prompt, of shape `(batch, length)`.
    """

    def __init__(self, head: FSPADModel, target: PreTrainedModel, knobs: DraftingKnobs, prompt_ids: torch.LongTensor):
        self.head = head
        self.target = target
        self.knobs = knobs
        self.lm_head = LMHead(target, _with_prompt(head.active_draft_vocab_ids, prompt_ids))
        self.cache = DynamicCache()
        self.padding_mask: torch.Tensor | None = None

    def extend(
        self,
        features: torch.Tensor,
        next_embeds: torch.Tensor,
        position_ids: torch.LongTensor,
        padding_mask: torch.Tensor | None = None,
    ) -> None:
        """Take in true features of the target, which replace whatever was drafted for their positions.

        Args:
            features: The target's features at positions t, of shape `(batch, length, hidden)`.
            next_embeds: The target's embeddings of the tokens at t+1, of the same shape.
            position_ids: Positions t, of shape `(batch, length)`.
            padding_mask: 1 for true positions and 0 for padding, of shape `(batch, length)`; `None` for no padding.
        """
        past_length = self.cache.get_seq_length()
        if padding_mask is not None or self.padding_mask is not None:
            ones = position_ids.new_ones(features.shape[0], past_length)
            past = self.padding_mask if self.padding_mask is not None else ones
            new = padding_mask if padding_mask is not None else torch.ones_like(position_ids)
            self.padding_mask = torch.cat([past, new.to(past.device)], dim=1)
        predict, regress = self._run_head(features, next_embeds, position_ids, self.padding_mask)
        self.last_predict, self.last_regress = predict[:, -1:], regress[:, -1:]
        self.last_position = position_ids[:, -1:]

    def draft(self, root_tokens: torch.LongTensor, max_depth: int) -> DraftTree:
        """Draft a tree that continues the last position taken in.

        Args:
            root_tokens: The last emitted token, of shape `(batch, 1)`.
            max_depth: Levels that may still be of use, e.g. because few tokens may still be generated.

        Returns:
            The best tree within the knobs, on the device of `root_tokens`.
        """
        num_levels = min(self.knobs.depth + 1, max_depth, self.knobs.num_draft_tokens)
        nodes = DraftedNodes()
        if num_levels > 0:
            frontier = self._first_level(nodes)
            for level in range(1, num_levels):
                if self._is_hopeless(frontier, nodes):
                    break
                frontier = self._next_level(nodes, frontier, level)
            self.cache.crop(-(frontier.visible.shape[-1] - frontier.visible.shape[1]))
        tree = nodes.best_tree(root_tokens.to(self.lm_head.device), self.knobs.num_draft_tokens)
        return tree.to(root_tokens.device)

    def _first_level(self, nodes: DraftedNodes) -> _Frontier:
        tokens, scores = self._best_children(self.last_predict)  # (batch, 1, top_k)
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
        position_ids = (self.last_position + level).expand(-1, width)
        predict, regress = self._run_head(frontier.features, embeds, position_ids, self._tree_mask(frontier.visible))
        tokens, log_probs = self._best_children(predict)  # (batch, width, top_k)
        top_k = tokens.shape[-1]
        scores = (frontier.scores[..., None] + log_probs).flatten(1)  # (batch, width * top_k)
        tokens = tokens.flatten(1)
        first = nodes.add_level(tokens, frontier.indices.repeat_interleave(top_k, dim=1), scores)

        best = scores.topk(min(self.knobs.top_k, scores.shape[1]), dim=1)
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

    def _best_children(self, predict: torch.Tensor) -> tuple[torch.LongTensor, torch.FloatTensor]:
        """The `top_k` best tokens and their log-probabilities, of shape `(batch, length, top_k)` each."""
        logits = self.lm_head(predict).float()
        top = logits.topk(min(self.knobs.top_k, logits.shape[-1]), dim=-1)
        log_probs = top.values - logits.logsumexp(dim=-1, keepdim=True)
        tokens = top.indices if self.lm_head.token_ids is None else self.lm_head.token_ids[top.indices]
        # Rounding may lift a probability above 1, and no child may score above its parent
        return tokens, log_probs.clamp(max=0.0)

    def _is_hopeless(self, frontier: _Frontier, nodes: DraftedNodes) -> bool:
        threshold = self.knobs.confidence_threshold
        if threshold is not None and bool(frontier.scores.max().exp() < threshold):
            return True
        # The wait for the device costs less than a level that leaves the tree as it is
        return not nodes.can_improve(frontier.scores, self.knobs.num_draft_tokens)

    def _run_head(
        self,
        features: torch.Tensor,
        next_embeds: torch.Tensor,
        position_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`predict` and `regress` of the head, on the device of the LM head, where drafts are scored and chosen."""
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

    def _tree_mask(self, visible: torch.BoolTensor) -> torch.Tensor:
        """Additive mask of shape `(batch, 1, width, true positions + drafted rows)` in the head's dtype."""
        batch, width, num_rows = visible.shape
        num_true = self.cache.get_seq_length() - (num_rows - width)
        if self.padding_mask is None:
            true_positions = visible.new_ones(batch, width, num_true)
        else:
            true_positions = self.padding_mask.bool()[:, None].expand(-1, width, -1).to(visible.device)
        allowed = torch.cat([true_positions, visible], dim=-1)[:, None]
        mask = torch.zeros(allowed.shape, dtype=self.head.dtype, device=visible.device)
        return mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)


def _with_prompt(vocab_ids: torch.LongTensor | None, prompt_ids: torch.LongTensor) -> torch.LongTensor | None:
    """The draft vocabulary and those tokens of the prompt that are not in it; `None` for all tokens."""
    if vocab_ids is None:
        return None
    prompt_ids = prompt_ids.to(vocab_ids.device).unique()
    return torch.cat([vocab_ids, prompt_ids[~torch.isin(prompt_ids, vocab_ids)]])
