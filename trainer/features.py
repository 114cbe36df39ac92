"""The target's features of whole dialogues, computed while training needs them or beforehand onto disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from fspad.target import FeatureTap, device_of

from .feature_shards import FeatureShards, check_rows, describe_rows, describe_target
from .token_ids import check_token_ids

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


def check_finite(is_finite: torch.Tensor, target: PreTrainedModel, name_row: Callable[[int], str]) -> None:
    """Check that features can be trained on.

    Args:
        is_finite: Whether all of a token's feature is finite, of shape `(batch, length)` and dtype bool.
        target: The model that the features are of.
        name_row: From the number of a row in the batch to what an error calls it.

    Raises:
        ValueError: If a token's is not.
    """
    if is_finite.all():
        return
    row = int(is_finite.all(dim=1).int().argmin())
    count = int((~is_finite[row]).sum())
    if target.dtype == torch.float16:
        advice = "float16 overflows above 65504: load the target in bfloat16 or float32"
    else:
        advice = "check the target's weights (does it write sensible text?), or leave this row out"
    raise ValueError(
        f"expected finite features from {type(target).__name__} in {str(target.dtype).removeprefix('torch.')}, got NaN or "
        f"infinity at {count} tokens of {name_row(row)}; {advice}."
    )


def add_features(dataset: Dataset, target: PreTrainedModel, features_dir: str | Path, batch_size: int = 8) -> Dataset:
    """Compute the features of a prepared dataset once, onto disk, and put them beside its tokens.

    The folder gets shards of rows, each written whole or not at all: after an interruption, even a kill, the same call
    computes the shards that are missing. `features.json` tells the target (name, revision, dtype, attention, weights)
    and the tokens that they are of; with others the folder is refused. The shards are mapped into memory as they are, so
    that features far larger than the memory can be trained on. Of several processes that share a folder, one computes
    and the others wait.

    Args:
        dataset: Rows with `input_ids`, and with `position_ids` if they are packed, as
            [`~fspad.trainer.data.prepare_dataset`] returns them.
        target: The model that the head is trained for. It is put into evaluation mode.
        features_dir: Folder of the features of this one dataset. It is made, or used again.
        batch_size: Rows at once.

    Returns:
        The dataset with a column `features`, whose rows are tensors of shape `(length, hidden)` in the target's dtype.

    Raises:
        OSError: If a shard cannot be written, e.g. to a full disk. The shards before it are kept.
        ValueError: If the dataset is a stream, has no rows or has features already, the folder holds features of
            another target or dataset or a damaged shard, or the target gives NaN or infinity.
    """
    import datasets

    check_rows(dataset)
    target.eval()
    tokens = dataset.with_format(None)
    lengths, settings = describe_rows(tokens)
    settings = {**describe_target(target), **settings}
    row_bytes = settings["hidden_size"] * target.dtype.itemsize
    shards = FeatureShards(Path(features_dir), settings, [length * row_bytes for length in lengths])
    shards.fill(lambda rows: _compute_rows(tokens, rows, target, batch_size), lengths)
    dataset = datasets.concatenate_datasets([tokens, shards.load()], axis=1)
    return dataset.with_transform(_Decode(target.dtype, settings["hidden_size"]))


def _compute_rows(tokens: Dataset, rows: range, target: PreTrainedModel, batch_size: int) -> list[torch.Tensor]:
    """Features of some rows in their order, computed in batches of rows that are about as long.

    Padding changes them as any batch does. Measured on random targets of five families against one row at a time: by
    2e-6 of the largest value in fp32, and by up to 2e-2 in bf16 (more where a router then chooses another expert).
    """
    columns = [name for name in ("input_ids", "position_ids") if name in tokens.column_names]
    table = tokens.select_columns(columns)[rows.start : rows.stop]
    order = sorted(range(len(rows)), key=lambda row: len(table["input_ids"][row]))
    features: dict[int, torch.Tensor] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        input_ids = _pad([table["input_ids"][row] for row in chosen])
        check_token_ids(input_ids, target.config.get_text_config(decoder=True).vocab_size)
        lengths = torch.tensor([len(table["input_ids"][row]) for row in chosen])
        mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        if "position_ids" in table:
            # Padding at position 0, as the data collator puts it
            positions = _pad([table["position_ids"][row] for row in chosen])
            batch = compute_features(target, input_ids, None, positions)
        else:
            batch = compute_features(target, input_ids, mask.long())
        is_finite = torch.isfinite(batch).all(dim=-1) | ~mask.to(batch.device)
        check_finite(is_finite, target, lambda i, chosen=chosen: f"row {rows[chosen[i]]} of the dataset")
        for row, row_features, length in zip(chosen, batch.cpu(), lengths.tolist(), strict=True):
            features[row] = row_features[:length]
    return [features[row] for row in range(len(rows))]


def _pad(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    return pad_sequence([torch.as_tensor(row, dtype=torch.long) for row in rows], batch_first=True)


@dataclass(frozen=True)
class _Decode:
    """From bytes to tensors. `datasets` keeps it where it concatenates datasets, as those of one target compare equal."""

    dtype: torch.dtype
    hidden_size: int

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        if "features" in batch:
            batch["features"] = [
                torch.frombuffer(bytearray(row), dtype=self.dtype).view(-1, self.hidden_size)
                for row in batch["features"]
            ]
        return batch
