"""The loop of assisted decoding: prefill, then draft, verify and accept until plain decoding would stop."""

from __future__ import annotations

import torch

from .acceptance import TokenChooser, accept
from .draft_source import Emitted
from .drafting import Drafter
from .target import embed_tokens
from .timing import Stopwatch
from .verification import Verifier
from .verification_mode import VerificationMode


class DecodingLoop:
    """One call of assisted decoding. All state of the call lives here and goes with it.

    Args:
        verifier: The target, which verifies.
        drafter: Drafts trees, or chains for targets that cannot verify trees.
        chooser: Chooses tokens as plain decoding does.
    """

    def __init__(self, verifier: Verifier, drafter: Drafter, chooser: TokenChooser):
        self.verifier = verifier
        self.drafter = drafter
        self.chooser = chooser
        self.accept_lengths: list[int] = []
        device = verifier.target.device
        self.draft_watch, self.verify_watch = Stopwatch(device), Stopwatch(device)

    def run(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """Decode until plain decoding would stop.

        Args:
            input_ids: The prompt, of shape `(1, length)`.

        Returns:
            Prompt and new tokens, of shape `(1, total length)`.
        """
        with self.verifier:
            input_ids, is_done = self._prefill(input_ids)
            with self.verifier.decoding():
                while not is_done:
                    input_ids, is_done = self._step(input_ids)
        return input_ids

    def _prefill(self, input_ids: torch.LongTensor) -> tuple[torch.LongTensor, bool]:
        """Run the target on the prompt, choose the first token, and show both to the drafter."""
        prompt_inputs = dict(self.verifier.model_kwargs)
        verified = self.verifier.prefill(input_ids)
        # Only now is it known whether the target can be told where the nodes of a tree stand
        self.drafter.is_chain |= self.verifier.mode is VerificationMode.CHAIN
        input_ids, is_done = self.chooser.emit(input_ids, self.chooser.choose(input_ids, verified.logits[:, -1]))
        if not is_done:
            with self.draft_watch.running():
                self._show_prompt(verified.features, input_ids, prompt_inputs)
        return input_ids, is_done

    def _show_prompt(self, features: torch.Tensor, input_ids: torch.LongTensor, inputs: dict) -> None:
        # Not what was cached before, of which a target may have computed all anew
        past_length = self.verifier.cache.get_seq_length() - features.shape[1]
        length, prompt_embeds = features.shape[1], inputs.get("inputs_embeds")
        if prompt_embeds is None and length >= input_ids.shape[1]:  # states of an image stand before the text
            past_length += length - input_ids.shape[1] + 1
            length = input_ids.shape[1] - 1
            features = features[:, -length:]
        if prompt_embeds is not None:
            first_token = embed_tokens(self.verifier.target, input_ids[:, -1:])
            next_embeds = torch.cat([prompt_embeds[:, prompt_embeds.shape[1] - length + 1 :], first_token], dim=1)
        else:
            next_embeds = embed_tokens(self.verifier.target, input_ids[:, -length:])
        self.position_ids = torch.arange(past_length, past_length + length, device=input_ids.device)[None]
        padding_mask = inputs.get("attention_mask")
        if padding_mask is not None:
            padding_mask = padding_mask[:, : past_length + length]
            self.position_ids = (padding_mask.cumsum(-1) - 1).clamp(min=0)[:, past_length:]
            # One look, for a mask of the prompt's length squared that is rarely needed
            padding_mask = None if padding_mask.all() else padding_mask[:, past_length:]
        self.drafter.extend(Emitted(input_ids.tolist(), features, next_embeds, self.position_ids, padding_mask))

    def _step(self, input_ids: torch.LongTensor) -> tuple[torch.LongTensor, bool]:
        """Draft a tree, verify it, and emit what the target accepts."""
        with self.draft_watch.running():
            tree = self.drafter.draft(self._useful_depth(input_ids), input_ids.device)
        with self.verify_watch.running():
            verified = self.verifier.run(tree, input_ids)
            accepted = accept(tree, verified.logits, input_ids, self.chooser)
            # Whatever was raised on the way, a cache of the user's must not keep rejected drafts
            self.verifier.keep(verified.outputs, accepted.path, accepted.nodes, tree.num_nodes)
            if accepted.error is not None:
                raise accepted.error
            self.verifier.record(verified.outputs, accepted.path, tree.num_nodes)
        self.accept_lengths.append(len(accepted.path))
        self.drafter.size.end(tree.num_nodes, len(accepted.path), self.draft_watch.last, self.verify_watch.last)
        if not accepted.is_done:
            with self.draft_watch.running():
                emitted = len(accepted.path)
                steps = torch.arange(1, emitted + 1, device=self.position_ids.device)
                self.position_ids = self.position_ids[:, -1:] + steps
                features = verified.features.index_select(1, accepted.nodes.to(verified.features.device))
                next_embeds = embed_tokens(self.verifier.target, accepted.input_ids[:, -emitted:])
                self.drafter.extend(Emitted([accepted.token_ids], features, next_embeds, self.position_ids))
        return accepted.input_ids, accepted.is_done

    def _useful_depth(self, input_ids: torch.LongTensor) -> int:
        """Levels of drafts that could still be emitted; the step itself emits one token more."""
        num_tokens = input_ids.shape[1]
        useful = self.chooser.stopping_criteria.max_length - num_tokens - 1
        limit = self.verifier.max_depth(num_tokens)
        return max(0, useful if limit is None else min(useful, limit))
