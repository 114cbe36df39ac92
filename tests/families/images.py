"""Images for vision-language models of every kind, found by trying: families disagree about shapes and counts of tokens."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from families.tiny_models import FIRST_SPECIAL


def image_inputs(target: PreTrainedModel, prompt: torch.Tensor) -> dict[str, Any] | None:
    """Inputs with an image that the forward pass of a model accepts.

    Args:
        target: The model.
        prompt: Token ids that stand around the image, of shape `(1, length)`.

    Returns:
        The inputs, or `None` if none of the known forms is accepted.
    """
    config = target.config
    names = ("image_token_id", "image_token_index", "image_patch_id")
    token = next((value for name in names if isinstance(value := getattr(config, name, None), int)), FIRST_SPECIAL)
    for pixels in _forms(target):
        num_tokens: set[int] = set()
        candidates = [1, 4, 16, 2, 8, 0]
        while candidates:
            number = candidates.pop(0)
            if number in num_tokens or number > 300:
                continue
            num_tokens.add(number)
            inputs = _around(prompt, token, number, target) | pixels
            try:
                with torch.no_grad():
                    target(**inputs)
            except Exception as error:  # whatever a family says to inputs of another; most say the number
                said = [int(n) for n in re.findall(r"\d+", str(error))][:6]
                candidates = [n for n in itertools.chain(said, (n // 64 for n in said)) if n] + candidates
                continue
            return inputs
    return None


def _around(prompt: torch.Tensor, token: int, number: int, target: PreTrainedModel) -> dict[str, torch.Tensor]:
    image = torch.full((1, number), token)
    ids = torch.cat([prompt[:, :2], image, prompt[:, 2:]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inspect.signature(target.forward).parameters:
            inputs[name] = (ids == token).long()
    return inputs


def _forms(target: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """Pixels in every form that is in use."""
    names = inspect.signature(target.forward).parameters
    vision = getattr(target.config, "vision_config", target.config)
    generator = torch.Generator(torch.get_default_device()).manual_seed(2)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(target.dtype)

    if "image_grid_thw" in names:
        patch, frames = getattr(vision, "patch_size", 8), getattr(vision, "temporal_patch_size", None) or 1
        for size in {3 * frames * patch * patch, 3 * patch * patch}:
            yield {"pixel_values": noise(16, size), "image_grid_thw": torch.tensor([[1, 4, 4]])}
        yield {"pixel_values": noise(16, 3, patch, patch), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    for shape in ((1, 3, 32, 32), (1, 1, 3, 32, 32), (1, 2, 3, 32, 32), (1, 1, 4, 3, 32, 32)):
        form = {"pixel_values": noise(*shape)}
        if "image_sizes" in names:
            yield form | {"image_sizes": torch.tensor([[32, 32]])}
        if "aspect_ratio_ids" in names:
            lengths = {"aspect_ratio_ids": torch.tensor([[1]]), "aspect_ratio_mask": torch.ones(1, 1, shape[-4])}
            yield form | {name: value.long() for name, value in lengths.items()}
        yield form
