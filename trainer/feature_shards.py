"""Features on disk: a folder of Arrow shards, and what they were computed from."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from transformers.utils import logging

from .progress import show_progress
from .resumable import find_differences, say_how_to_go_on, write_whole

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

logger = logging.get_logger(__name__)

# Most bytes of a shard, which are held in memory until it is written, and seconds that go into one: what is lost at most
# when a run is killed.
_SHARD_BYTES = 1 << 28
_SHARD_SECONDS = 30.0
# Rows that the first shard of a run has, before the speed is known.
_FIRST_ROWS = 16
# Rows of a shard that are copied at once while it is written.
_ROWS_AT_ONCE = 64
_SHARD_NAME = re.compile(r"features-(\d+)-(\d+)\.arrow")
# Integers of the sizes of all elements, whose sums are exact in any order.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ELEMENTS_AT_ONCE = 1 << 24
# Parts of a target's configuration that its features do not depend on.
_NO_MATTER = {
    *("_name_or_path", "architectures", "dtype", "id2label", "label2id", "transformers_version", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "output_attentions", "output_hidden_states", "return_dict"),
}


class FeatureShards:
    """A folder with the features of one dataset by one target, in files that each hold the features of some rows.

    Args:
        folder: The folder. It is made.
        settings: What the features depend on, as JSON can hold it.
        row_bytes: Bytes of each row's features.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], row_bytes: list[int]):
        self.folder = folder
        self.row_bytes = row_bytes
        self.settings = settings
        self._file = folder / "features.json"

    def fill(self, compute: Callable[[range], list[torch.Tensor]], lengths: Sequence[int]) -> None:
        """Compute the rows that are missing.

        Args:
            compute: From rows of the dataset to the features of each, of shape `(length, hidden)`.
            lengths: Tokens of each row of the dataset.

        Raises:
            OSError: If a shard cannot be written.
            ValueError: If the folder holds other features.
        """
        if not self._missing():
            # Nothing is written, since the folder may allow no more than reading.
            self._check()
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # Let go of by the system if the process dies
        with FileLock(self.folder / ".lock"):
            self._claim()
            missing = self._missing()
            self._warn_of_full_disk(missing)
            with show_progress("features", len(lengths), len(lengths) - sum(map(len, missing))) as advance:
                seconds_per_byte = None
                for gap in missing:
                    while gap:
                        rows = self._next_rows(gap, seconds_per_byte)
                        start = time.perf_counter()
                        _write_shard(self._path(rows), compute(rows))
                        seconds_per_byte = (time.perf_counter() - start) / self._size(rows)
                        advance(len(rows), sum(lengths[rows.start : rows.stop]))
                        gap = range(rows.stop, gap.stop)

    def load(self) -> Dataset:
        """Map the shards into memory.

        Returns:
            A dataset with the column `features` of bytes.

        Raises:
            ValueError: If a shard is damaged.
        """
        import datasets
        import pyarrow.compute

        shards = []
        for rows in self._shards():
            path, expected, got = self._path(rows), self.row_bytes[rows.start : rows.stop], []
            try:
                shards.append(datasets.Dataset.from_file(str(path)))
                got = pyarrow.compute.binary_length(shards[-1].data["features"]).to_pylist()
                described = f"{len(got)} rows of {sum(got)} bytes"
            except (KeyError, OSError, ValueError) as error:
                described = f"what cannot be read: {error}"
            if got != expected:
                raise ValueError(
                    f"expected {len(rows)} rows of {sum(expected)} bytes in {path}, got {described}; remove this file to have "
                    "it computed again."
                )
        return datasets.concatenate_datasets(shards)

    def _shards(self) -> list[range]:
        """The rows of each shard, in order."""
        matches = (_SHARD_NAME.fullmatch(path.name) for path in self.folder.glob("features-*.arrow"))
        shards = (range(int(match[1]), int(match[2]) + 1) for match in matches if match)
        return sorted(shards, key=lambda rows: rows.start)

    def _missing(self) -> list[range]:
        """The rows between shards that are in none."""
        starts = [0, *(rows.stop for rows in self._shards())]
        stops = [*(rows.start for rows in self._shards()), len(self.row_bytes)]
        return [range(start, stop) for start, stop in zip(starts, stops, strict=True) if start != stop]

    def _path(self, rows: range) -> Path:
        return self.folder / f"features-{rows.start:08}-{rows.stop - 1:08}.arrow"

    def _size(self, rows: range) -> int:
        return sum(self.row_bytes[rows.start : rows.stop])

    def _next_rows(self, gap: range, seconds_per_byte: float | None) -> range:
        """The rows of the next shard, as many as a shard may take of time and memory, and one at least."""
        most = _SHARD_BYTES if seconds_per_byte is None else min(_SHARD_BYTES, _SHARD_SECONDS / seconds_per_byte)
        stop, size = gap.start + 1, self.row_bytes[gap.start]
        while stop < gap.stop and size + self.row_bytes[stop] <= most:
            if seconds_per_byte is None and stop - gap.start == _FIRST_ROWS:
                break
            size += self.row_bytes[stop]
            stop += 1
        return range(gap.start, stop)

    def _claim(self) -> None:
        """Write what the shards will be computed from or, if there are any, check what they were."""
        for part in self.folder.glob("*.part"):
            part.unlink()  # of a run that was killed
        if any(self.folder.glob("features-*.arrow")):
            self._check()
        else:
            write_whole(self._file, [json.dumps(self.settings, indent=2, ensure_ascii=False) + "\n"])

    def _check(self) -> None:
        if not self._file.exists():
            raise ValueError(
                f"expected {self._file}, which says what the features beside it are of, got no such file: name another "
                "folder."
            )
        try:
            before = dict(json.loads(self._file.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"expected JSON in {self._file}, got what cannot be read: name another folder."
            ) from error
        if differences := find_differences(*_comparable(before, self.settings)):
            raise ValueError(
                f"expected the features of this target and dataset in {self.folder}, got those of others "
                f"({'; '.join(differences)}): name another folder, or remove this one to have them computed again."
            )

    def _warn_of_full_disk(self, missing: Sequence[range]) -> None:
        needed = sum(map(self._size, missing))
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            logger.warning(
                f"The features need {needed / 1e9:.1f} GB more in {self.folder}, where {free / 1e9:.1f} GB are free."
            )


def check_rows(dataset: Dataset) -> None:
    """Check that features of a dataset can be computed onto disk.

    Args:
        dataset: The dataset.

    Raises:
        ValueError: If it is a stream, is not prepared, has no rows, or has features.
    """
    import datasets

    if isinstance(dataset, datasets.IterableDataset):
        raise ValueError(
            "expected a `datasets.Dataset` to compute features of onto disk, got a stream; load it without "
            "`streaming=True`, or have the features computed during training."
        )
    if "input_ids" not in dataset.column_names:
        raise ValueError(
            f"expected a column `input_ids`, got {', '.join(dataset.column_names)}; call `prepare_dataset` first."
        )
    if "features" in dataset.column_names:
        raise ValueError("expected rows without features, got a column `features`; remove it to have it computed.")
    if not len(dataset):
        raise ValueError(
            "expected rows to compute features of, got none; check the filters that the dataset comes from."
        )


def describe_target(target: PreTrainedModel) -> dict[str, Any]:
    """What features depend on, of the target.

    Args:
        target: The target, maybe wrapped by PEFT.

    Returns:
        Values that JSON can hold. `weights` is a fingerprint of all weights, but of those that accelerate has offloaded.
    """
    text_config = target.config.get_text_config(decoder=True)
    name = target.config._name_or_path
    # Each layer with an adapter tells what is active; PEFT's and transformers' models have methods of the same name.
    adapters = {
        adapter
        for module in target.modules()
        if getattr(module, "disable_adapters", None) is False
        for adapter in module.active_adapters
    }
    config = json.loads(text_config.to_json_string(use_diff=False))
    return {
        "target": str(Path(name).resolve()) if name and Path(name).is_dir() else name,
        "revision": getattr(target.config, "_commit_hash", None),
        "dtype": str(target.dtype).removeprefix("torch."),
        "attention": text_config._attn_implementation,
        "hidden_size": text_config.hidden_size,
        "adapters": sorted(adapters),
        "weights": _hash_weights(target),
        "config": {name: value for name, value in config.items() if name not in _NO_MATTER},
    }


def describe_rows(tokens: Dataset) -> tuple[list[int], dict[str, Any]]:
    """What features depend on, of the dataset.

    Args:
        tokens: Rows with `input_ids`, and with `position_ids` if they are packed.

    Returns:
        The length of each row, and values that JSON can hold. `dataset` is a fingerprint of the tokens themselves: that
        of `datasets` is another for the same file in another place.
    """
    columns = [name for name in ("input_ids", "position_ids") if name in tokens.column_names]
    digest = hashlib.sha256(" ".join(columns).encode())
    lengths: list[int] = []
    for table in tokens.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        lengths += table["input_ids"].combine_chunks().value_lengths().to_pylist()
        for name in columns:
            column = table[name].combine_chunks()
            for values in (column.value_lengths(), column.flatten()):
                digest.update(values.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
    return lengths, {"rows": len(lengths), "tokens": sum(lengths), "dataset": digest.hexdigest()[:16]}


def _hash_weights(target: PreTrainedModel) -> str:
    """Of each tensor of a target its sum, which a fine-tuned target does not share."""
    digest = hashlib.sha256()
    for tensor in target.state_dict().values():
        if not isinstance(tensor, torch.Tensor):  # what some quantised layers keep beside their weights
            continue
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} {_sum_bits(tensor)} ".encode())
    return digest.hexdigest()[:16]


def _sum_bits(tensor: torch.Tensor) -> int | None:
    """Sum of a tensor's bits, read as integers: the same on every device and for every number of threads."""
    if tensor.is_meta:
        return None
    integers = tensor.detach().flatten().view(_INTEGERS[tensor.element_size()])
    return sum(int(part.sum(dtype=torch.int64)) for part in integers.split(_ELEMENTS_AT_ONCE))


def _comparable(before: dict[str, Any], now: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both settings without what may differ: the name of the same weights, and what only one release can configure."""
    before, now = dict(before), dict(now)
    before_config, config = before.pop("config", {}), now.pop("config")
    if before.get("weights") == now["weights"]:
        for settings, name in product((before, now), ("target", "revision")):
            settings.pop(name, None)
    for name in sorted(before_config.keys() & config.keys()):
        before[f"config.{name}"], now[f"config.{name}"] = before_config[name], config[name]
    return before, now


def _write_shard(path: Path, features: Sequence[torch.Tensor]) -> None:
    """Write a shard that is there either whole or not at all."""
    import pyarrow

    # Bytes, which Arrow maps into memory as they are, whatever the dtype
    schema = pyarrow.schema([("features", pyarrow.large_binary())])
    part = path.with_name(path.name + ".part")
    with say_how_to_go_on(path):
        try:
            with part.open("wb") as file:
                with pyarrow.ipc.new_stream(file, schema) as writer:
                    for start in range(0, len(features), _ROWS_AT_ONCE):
                        rows = map(_to_bytes, features[start : start + _ROWS_AT_ONCE])
                        writer.write_batch(pyarrow.record_batch([pyarrow.array(rows, pyarrow.large_binary())], schema))
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise


def _to_bytes(features: torch.Tensor) -> bytes:
    return features.contiguous().view(torch.uint8).numpy().tobytes()
