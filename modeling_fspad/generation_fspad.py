"""What `generate` calls on a head: checks, the choice of the way to decode, and the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import StaticCache
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from .acceptance import TokenChooser
from .automatic_size import AutomaticSize
from .decoding_loop import DecodingLoop
from .draft_size import FixedSize, drafting_options
from .draft_source import DraftSource
from .drafting import Drafter
from .experience import experience_of
from .head_source import HeadSource
from .hook import install_hook
from .lookup_source import LookupSource
from .packed_linear import copied
from .plain_decoding import decode_plainly
from .position_limits import position_table_length
from .provenance import warn_of_another_target
from .sampling_noise import SamplingNoise, sampling_noise
from .step_costs import costs_of
from .target import check_target, device_of
from .verification import Verifier
from .verification_mode import VerificationMode

if TYPE_CHECKING:
    from transformers import PreTrainedModel


logger = logging.get_logger(__name__)


@dataclass
class FSPADGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with an FSPAD head and `return_dict_in_generate=True`.

    Everything that plain decoding returns is there with one entry a token. tau is `accept_lengths.sum() / steps`, and
    1.0 when there is no step.

    Args:
        accept_lengths: Tokens emitted by each verification step, the target's own (bonus) token included, of shape
            `(steps,)`, or `(batch, steps)` padded with zeros. The token of the prefill is not a step.
        draft_time: Seconds spent drafting.
        verify_time: Seconds spent verifying.
    """

    accept_lengths: torch.LongTensor | None = None
    draft_time: float | None = None
    verify_time: float | None = None


class AssistedDecodingMixin:
    """Assisted decoding for a head, mixed into the model.

    The name must not end like that of `GenerationMixin`: transformers would take the head for a model that generates.
    """

    @torch.no_grad()
    def assisted_decoding(
        self,
        target: PreTrainedModel,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        inputs_tensor: torch.Tensor | None = None,
        assistant_model: Any = None,
        assistant_tokenizer: Any = None,
        tokenizer: Any = None,
        **model_kwargs: Any,
    ) -> FSPADGenerateOutput | torch.LongTensor:
        """Decode with the target, assisted by this head. Called by `target.generate(..., assistant_model=head)`.

        Args:
            target: The model whose `generate` was called.
            input_ids: The prompt, of shape `(batch, length)`.
            logits_processor: Applied to the true prefix of every token.
            stopping_criteria: Asked after every token.
            generation_config: The options of `generate`.
            synced_gpus: Whether ranks must run the same number of forward passes; decodes plainly.
            streamer: Gets every token in order.
            inputs_tensor: Not used.
            assistant_model: Not used; this head.
            assistant_tokenizer: Not used; the head shares the target's tokens.
            tokenizer: Not used here.
            **model_kwargs: The model inputs that `generate` prepared.

        Returns:
            The tokens of shape `(batch, length)`, or an [`FSPADGenerateOutput`] with `return_dict_in_generate=True`.

        Raises:
            ValueError: If head and target do not fit, or for options under which nothing can be rolled back.
        """
        check_target(self.config, target)
        warn_of_another_target(self.config, target)
        self.config.check_drafting()
        check_inputs(input_ids, model_kwargs)
        num_draft_tokens, threshold = drafting_options(self.config, generation_config)
        if input_ids.shape[0] > 1:
            mode, reason = VerificationMode.PLAIN, f"the batch has {input_ids.shape[0]} rows, one is supported"
        elif synced_gpus:
            mode, reason = VerificationMode.PLAIN, "ranks run in step (synced_gpus)"
        else:
            mode, reason = Verifier.decide(target, model_kwargs)
        self._explain(target, mode, reason)

        if mode is VerificationMode.PLAIN:
            output, accept_lengths = decode_plainly(
                target,
                input_ids,
                stopping_criteria,
                logits_processor=logits_processor,
                generation_config=generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
            if not generation_config.return_dict_in_generate:
                return output
            return FSPADGenerateOutput(**output, accept_lengths=accept_lengths, draft_time=0.0, verify_time=0.0)

        self._check_length(target, input_ids, model_kwargs.get("attention_mask"))
        noise = None
        if generation_config.do_sample:
            noise = sampling_noise(logits_processor, (input_ids.shape[0], self.config.vocab_size), input_ids.device)
        chooser = TokenChooser(
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            do_sample=generation_config.do_sample,
            streamer=streamer,
            keep_scores=generation_config.return_dict_in_generate and generation_config.output_scores,
            keep_logits=generation_config.return_dict_in_generate and generation_config.output_logits,
            noise=noise,
        )
        verifier = Verifier(target, mode, generation_config, model_kwargs)
        is_chain = mode is VerificationMode.CHAIN
        top_k = 1 if is_chain else self.config.draft_top_k
        sources = evaluating(self).draft_sources(target, input_ids, top_k, noise)
        if num_draft_tokens == "auto":
            experience = experience_of(self, target, noise is not None)
            size = AutomaticSize(costs_of(target, mode), experience, self.config.draft_depth, threshold)
        else:
            size = FixedSize(num_draft_tokens, self.config.draft_depth, threshold)
        loop = DecodingLoop(verifier, Drafter(sources, size, is_chain), chooser)
        sequences = loop.run(input_ids)
        if verifier.mode is not mode:  # known from the prefill on
            self._explain(target, verifier.mode, f"{type(target).__name__} counts positions by itself")
        if streamer is not None:
            streamer.end()
        if not generation_config.return_dict_in_generate:
            return sequences
        return FSPADGenerateOutput(
            sequences=sequences,
            scores=chooser.scores if chooser.keep_scores else None,
            logits=chooser.logits if chooser.keep_logits else None,
            attentions=verifier.attentions if generation_config.output_attentions else None,
            hidden_states=verifier.hidden_states if generation_config.output_hidden_states else None,
            past_key_values=verifier.cache,
            accept_lengths=torch.tensor(loop.accept_lengths, dtype=torch.long, device="cpu"),
            draft_time=loop.draft_watch.seconds(),
            verify_time=loop.verify_watch.seconds(),
        )

    def draft_sources(
        self, target: PreTrainedModel, prompt_ids: torch.LongTensor, top_k: int, noise: SamplingNoise | None
    ) -> list[DraftSource]:
        """Who drafts for one call of `generate`, the cheapest first. Override it to add a source of your own.

        Args:
            target: The model whose `generate` was called.
            prompt_ids: The prompt, of shape `(batch, length)`.
            top_k: Children that a node may have; 1 where only a chain can be verified.
            noise: What the target will sample with; `None` for greedy decoding, and where it cannot be foreseen.
        """
        head = HeadSource(self, target, top_k, prompt_ids, noise)
        if not self.config.lookup:
            return [head]
        return [LookupSource(experience_of(self, target, noise is not None).lookup_trust), head]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # What stock code asks an assistant for, so the hook is gone: some library has put the stock methods back
            if name != "generation_config":
                raise
            install_hook()
            raise AttributeError(
                "an FSPAD head decodes through a hook in `generate`, which another library has replaced since it was "
                "installed. It is installed again: repeat the call, and import that library before the head is loaded."
            ) from None

    def _explain(self, target: PreTrainedModel, mode: VerificationMode, reason: str | None) -> None:
        """Say once what is slower than it could be, and why."""
        if mode is VerificationMode.CHAIN:
            logger.warning_once(f"FSPAD verifies a chain instead of a tree, as lossless but slower: {reason}.")
        elif mode is VerificationMode.PLAIN:
            logger.warning_once(f"FSPAD falls back to plain decoding: {reason}.")
        for name, ours, theirs in (
            ("device", self.device, device_of(target.get_output_embeddings())),
            ("dtype", self.dtype, target.dtype),
        ):
            if ours != theirs:
                logger.warning_once(
                    f"The FSPAD head has {name} {ours}, the target {theirs}: features are converted at every step. "
                    f"`head.to({theirs!r})` saves that."
                )

    def _check_length(self, target: PreTrainedModel, input_ids: torch.LongTensor, padding_mask: Any) -> None:
        length = input_ids.shape[1] if padding_mask is None else int(padding_mask.sum(-1).max())
        limit = position_table_length(target)
        if limit is not None and length > limit:
            raise ValueError(
                f"the prompt has {length} tokens, {type(target).__name__} has {limit} positions: shorten the prompt."
            )
        if length > self.config.max_position_embeddings:
            logger.warning_once(
                f"The prompt has {length} tokens, the FSPAD head was made for {self.config.max_position_embeddings}: "
                "the text stays the same, but fewer drafts may be accepted."
            )


def check_inputs(input_ids: torch.LongTensor, model_kwargs: dict[str, Any]) -> None:
    """Refuse inputs under which nothing can be verified or rolled back.

    Args:
        input_ids: The prompt, of shape `(batch, length)`.
        model_kwargs: The model inputs that `generate` prepared.

    Raises:
        ValueError: For `use_cache=False`, a static cache or an empty prompt.
    """
    if not model_kwargs.get("use_cache", True):
        raise ValueError("an FSPAD head needs the target's cache, got use_cache=False: drop it or `assistant_model`.")
    if isinstance(model_kwargs.get("past_key_values"), StaticCache):
        raise ValueError(
            "an FSPAD head needs a cache that can be rolled back, got a static one: drop `cache_implementation` (the "
            "default is a dynamic cache) or `assistant_model`."
        )
    if input_ids.shape[1] == 0 and model_kwargs.get("inputs_embeds") is None:
        raise ValueError("the prompt is empty: expected at least one token, e.g. the target's bos token, got none.")


def evaluating(head: nn.Module) -> nn.Module:
    """A head as it is in evaluation mode, without changing its mode for others, e.g. for a trainer.

    Dropout would draw from the random numbers that sampling draws from.

    Args:
        head: A head in any mode.

    Returns:
        The head, or if it or a part of it is in training mode, a copy that shares its parameters and buffers.
    """
    if not any(module.training for module in head.modules()):
        return head

    def evaluate(module: nn.Module) -> nn.Module:
        module.training = False
        return module

    return copied(head, evaluate)
