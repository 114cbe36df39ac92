"""The target's features of whole dialogues: computed during training, or once and for all in a dataset's column."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fspad.target import FeatureTap, device_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


@torch.no_grad()
def compute_features(
    target: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the target over right-padded dialogues.

    Args:
        target: The model whose features are wanted; in evaluation mode.
        input_ids: Token ids of shape `(batch, length)`.
        attention_mask: 1 where a token is not padding, of shape `(batch, length)`.
        position_ids: Of shape `(batch, length)`, restarting at 0 with each dialogue, if several are packed into a row.
            No `attention_mask` may come with them: transformers would no longer tell the dialogues apart.

    Returns:
        Features of shape `(batch, length, hidden)` in the target's dtype.
    """
    kwargs: dict[str, Any] = {"logits_to_keep": 0} if target._supports_logits_to_keep() else {}
    device = device_of(target.get_input_embeddings())
    if attention_mask is not None:
        kwargs["attention_mask"] = attention_mask.to(device)
    if position_ids is not None:
        kwargs["position_ids"] = position_ids.to(device)
    # One row of logits, because a target cannot be asked for none.
    with FeatureTap(target) as tap, tap.record(logits_to_keep=1) as recorded:
        target(input_ids=input_ids.to(device), use_cache=False, **kwargs)
    return recorded[0]


def add_features(dataset: Dataset, target: PreTrainedModel, cache_dir: str | Path | None = None) -> Dataset:
    """Compute the features of a prepared dataset once, and keep them beside its tokens.

    The column holds raw bytes, which Arrow maps into memory as they are: a dataset far larger than the memory trains
    without being read twice. Rows come out with `features` as a tensor of shape `(length, hidden)`.

    Args:
        dataset: Rows with `input_ids`, as [`~fspad.trainer.data.prepare_dataset`] returns them.
        target: The model that the head is trained for, in evaluation mode.
        cache_dir: Folder for the Arrow file. Its name tells the dialogues and the target (name, dtype, attention and
            weights), so that only features of the same are used again.

    Returns:
        The dataset with a `features` column in the target's dtype.
    """
    import datasets

    hidden_size = target.config.get_text_config(decoder=True).hidden_size
    columns = datasets.Features({**dataset.features, "features": datasets.Value("large_binary")})

    def encode(input_ids: list[int]) -> dict[str, bytes]:
        features = compute_features(target, torch.tensor([input_ids]))[0].cpu().contiguous()
        return {"features": features.view(torch.uint8).numpy().tobytes()}

    # By hand: datasets would pickle the whole target to tell whether `encode` has changed
    fingerprint = datasets.fingerprint.Hasher.hash((dataset._fingerprint, _describe(target)))
    dataset = dataset.map(
        encode,
        input_columns=["input_ids"],
        features=columns,
        cache_file_name=None if cache_dir is None else str(Path(cache_dir) / f"features-{fingerprint}.arrow"),
        writer_batch_size=64,
        new_fingerprint=fingerprint,
        desc="Computing the target's features",
    )
    return dataset.with_transform(partial(_decode, dtype=target.dtype, hidden_size=hidden_size))


def _describe(target: PreTrainedModel) -> tuple[Any, ...]:
    """What the features depend on; of each weight its sum, which a fine-tuned target does not share."""
    sums = [float(parameter.detach().double().sum()) for parameter in target.parameters()]
    return target.config.to_json_string(), str(target.dtype), target.config._attn_implementation, sums


def _decode(batch: dict[str, list], dtype: torch.dtype, hidden_size: int) -> dict[str, list]:
    if "features" in batch:
        batch["features"] = [
            torch.frombuffer(bytearray(row), dtype=dtype).view(-1, hidden_size) for row in batch["features"]
        ]
    return batch
