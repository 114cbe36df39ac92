"""The random numbers that sampling will use next, for drafts to be drawn with the same.

To draw a token from probabilities p, torch divides them by exponential noise E and takes the maximum, that is the maximum of
`log p + G` with the Gumbel noise G = -log E. Plain decoding draws E once a token, and the state of the generator is known: so
while a token is drafted it is known with which noise the target will choose it. A head that adds the noise to its own logits
drafts what the target will choose wherever the two agree well enough, instead of what is most probable before any dice
are thrown (shared randomness as in Daliri et al., arXiv 2408.07978). The generator itself is only read: what the target
draws, and so the text, stays that of plain sampling.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from transformers import LogitsProcessorList
from transformers.generation import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

_TRUNCATING = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
# The most probable tokens of the head, among which those that truncation leaves are looked for
_NUM_TRUNCATED = 64


@dataclass
class _Draw:
    """A coming draw: the state of the generator before it, and its noise of shape `(batch, vocab)`."""

    state: torch.Tensor
    noise: torch.Tensor


class SamplingNoise:
    """Noise of the coming draws of one call of `generate`.

    Args:
        logits_processor: The target's, of which temperature and truncation are applied to drafts as well.
        shape: Of what tokens are drawn from, `(batch, vocab)`.
        device: Where they are drawn.
    """

    def __init__(self, logits_processor: LogitsProcessorList, shape: tuple[int, int], device: torch.device):
        self.shape = shape
        self.device = device
        self.is_reused = device.type == "cpu"
        temperatures = [warper.temperature for warper in logits_processor if type(warper) is TemperatureLogitsWarper]
        self.temperature = float(temperatures[-1]) if temperatures else 1.0
        kept = (TemperatureLogitsWarper, *_TRUNCATING)
        self._warpers = LogitsProcessorList(warper for warper in logits_processor if type(warper) in kept)
        self._truncates = any(type(warper) in _TRUNCATING for warper in self._warpers)
        self._generator = torch.Generator(device)
        self._coming: list[_Draw] = []
        self._next_state: torch.Tensor | None = None

    def begin(self) -> None:
        """A draft begins: the next draw is the one that will choose its first token."""
        state = generator_state(self.device)
        while self._coming and self._coming[0].state.numpy().tobytes() != state.numpy().tobytes():
            del self._coming[0]
        if not self._coming:
            self._next_state = state

    def draw(self, probabilities: torch.Tensor) -> torch.LongTensor:
        """Draw what `torch.multinomial` would draw now, and leave the generator as it would.

        On a processor, noise that was foreseen for this draw is not made a second time: it takes longer than all else in
        a draw. An accelerator makes it in no time, and would have to wait for a look at the probabilities.

        Args:
            probabilities: Of shape `(batch, vocab)` in float32.

        Returns:
            Tokens of shape `(batch, 1)`.
        """
        # NaN, which `multinomial` refuses, is in all of a softmax or in nothing of it
        if self.is_reused and self._coming and not probabilities[:, 0].isnan().any():
            self.begin()
            if self._coming:
                noise = self._coming.pop(0).noise
                set_generator_state(self.device, self._coming[0].state if self._coming else self._next_state)
                return (probabilities / noise).argmax(dim=-1, keepdim=True)
        return torch.multinomial(probabilities, num_samples=1)

    def of_draw(self, index: int) -> torch.Tensor:
        """Exponential noise of a coming draw.

        Args:
            index: 0 for the next draw.

        Returns:
            Noise of shape `(batch, vocab)` in float32.
        """
        while len(self._coming) <= index:
            self._generator.set_state(self._next_state)
            noise = torch.empty(self.shape, device=self.device).exponential_(generator=self._generator)
            self._coming.append(_Draw(self._next_state, noise))
            self._next_state = self._generator.get_state()
        return self._coming[index].noise

    def perturb(
        self, logits: torch.Tensor, token_ids: torch.LongTensor | None, index: int
    ) -> tuple[torch.Tensor, torch.LongTensor | None]:
        """Logits of which the maximum is what the target would draw, if the target had them.

        They are on the scale of the logits, and not divided by the temperature. So their softmax tells how sure it is,
        by how far the head's logits are usually off; without noise, at temperature 0, it is the head's own.

        Args:
            logits: The head's logits, of shape `(batch, width, draft_vocab)` in float32.
            token_ids: The tokens that they belong to, of shape `(draft_vocab,)`; `None` for the whole vocabulary.
            index: Of the draw that will choose between them.

        Returns:
            Logits of shape `(batch, width, kept)`, -inf for what truncation removes, and their columns in `logits`, of the
            same shape; `None` for all.
        """
        noise = self.of_draw(index).to(logits.device)
        if not self._truncates:
            noise = noise if token_ids is None else noise[:, token_ids]
            return logits - self.temperature * noise[:, None].log(), None
        top = logits.topk(min(_NUM_TRUNCATED, logits.shape[-1]), dim=-1)
        warped = self._warpers(None, top.values.flatten(0, 1)).view_as(top.values)
        tokens = top.indices if token_ids is None else token_ids[top.indices]
        noise = noise[:, None].expand(-1, logits.shape[1], -1).gather(-1, tokens)
        return self.temperature * (warped - noise.log()), top.indices


def sampling_noise(
    logits_processor: LogitsProcessorList, shape: tuple[int, int], device: torch.device
) -> SamplingNoise | None:
    """The noise of coming draws, where it is known how torch draws.

    Args:
        logits_processor: The target's.
        shape: Of what tokens are drawn from, `(batch, vocab)`.
        device: Where they are drawn.

    Returns:
        The noise, or `None` if a device draws in another way than with exponential noise.
    """
    return SamplingNoise(logits_processor, shape, device) if _is_foreseen(device, shape) else None


@cache
def _is_foreseen(device: torch.device, shape: tuple[int, int]) -> bool:
    """Whether the noise of `torch.multinomial` is foreseen, tried once with generators of our own."""
    if device.type == "meta":
        return False
    generators = [torch.Generator(device).manual_seed(0) for _ in range(2)]
    probabilities = torch.full(shape, 1 / shape[1], device=device)
    for _ in range(3):
        drawn = torch.multinomial(probabilities, num_samples=1, generator=generators[0])
        noise = torch.empty_like(probabilities).exponential_(generator=generators[1])
        if not torch.equal(drawn, (probabilities / noise).argmax(dim=-1, keepdim=True)):
            return False
    return torch.equal(generators[0].get_state(), generators[1].get_state())


def generator_state(device: torch.device) -> torch.Tensor:
    """The state of the default generator of a device.

    Args:
        device: The device.
    """
    if device.type == "cpu":
        return torch.get_rng_state()
    module = torch.get_device_module(device)
    return module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)


def set_generator_state(device: torch.device, state: torch.Tensor) -> None:
    """Put the default generator of a device back into a state.

    Args:
        device: The device.
        state: What [`generator_state`] has returned.
    """
    if device.type == "cpu":
        torch.set_rng_state(state)
        return
    module = torch.get_device_module(device)
    module.set_rng_state(state, *([] if device.type == "mps" else [device]))
