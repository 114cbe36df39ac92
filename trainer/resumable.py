"""Files of rows that a run appends to, and goes on with after it was interrupted anywhere."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import Any

SUFFIXES = (".jsonl", ".parquet")
_FORBIDDEN = (errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.EPERM, errno.EROFS)


def check_output(path: Path) -> None:
    """Check that a file can be written, as far as that can be told before.

    Args:
        path: Path of the file.

    Raises:
        ImportError: If that needs a package that is missing.
        OSError: If its folder cannot be written to.
        ValueError: If it is a folder, or ends in neither `.jsonl` nor `.parquet`.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"expected an output file that ends in {' or '.join(SUFFIXES)}, got {path}")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ImportError('writing Parquet needs pyarrow: `pip install "fspad[train]"`')
    if path.is_dir():
        raise ValueError(f"expected an output file, got the folder {path}: name a file in it")
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        got = "which cannot be written to" if folder.is_dir() else "which is a file"
        raise OSError(
            f"expected an output file in a folder that can be written to, got one in {folder}, {got}: name another"
        )


class ResumableFile:
    """Rows in a JSON-lines or Parquet file, to which only runs with the same settings append.

    The settings are in a file beside it, `NAME.settings.json`. As Parquet cannot be appended to, its rows are collected
    in `NAME.parquet.jsonl` beside it, until `finish`.

    Args:
        path: File that ends in `.jsonl` or `.parquet`. Its folder is made.
        settings: What the rows depend on, as JSON can hold it.

    Raises:
        ImportError: If Parquet needs a package that is missing.
        OSError: If the folder cannot be made or written to.
        ValueError: If the suffix is another, the file has rows of a run with other settings or of an unknown one, or it
            cannot be read.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        check_output(path)
        self.path = path
        self.is_parquet = path.suffix == ".parquet"
        self._rows = path.with_name(path.name + ".jsonl") if self.is_parquet else path
        self._settings = path.with_name(path.name + ".settings.json")
        with say_how_to_go_on(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        if any(file.exists() and file.stat().st_size for file in (path, self._rows)):
            self._check_settings(settings)
        else:
            write_whole(self._settings, [json.dumps(settings, indent=2, ensure_ascii=False) + "\n"])
        if self.is_parquet and path.exists() and not self._rows.exists():
            write_whole(self._rows, map(_to_line, _read_parquet(path)))
        with say_how_to_go_on(self._rows):
            self._rows.touch()

    def read(self) -> Iterator[dict[str, Any]]:
        """Read the rows that there are, and cut off a line that was only half written.

        Yields:
            Each row.

        Raises:
            ValueError: If a line is no row.
        """
        end = 0
        with self._rows.open("rb+") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    row = json.loads(line)
                except (RecursionError, ValueError):
                    row = None
                if not isinstance(row, dict):
                    raise ValueError(
                        f"{self._rows}:{number}: expected a row, got {line[:80]!r}; remove this line to have it done again."
                    )
                yield row
                end += len(line)
            file.truncate(end)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows.

        Args:
            rows: The rows.

        Raises:
            OSError: If they cannot be written, e.g. to a full disk. What is in the file stays good to go on with.
        """
        lines = "".join(map(_to_line, rows))
        with say_how_to_go_on(self._rows), self._rows.open("ab") as file:
            file.write(lines.encode())

    def finish(self) -> None:
        """Put the rows into the Parquet file, if it is one, and remove the file that they were collected in.

        Raises:
            OSError: If it cannot be written. The rows stay where they were collected.
        """
        if self.is_parquet:
            with say_how_to_go_on(self.path):
                _write_parquet(self.read(), self.path)
            self._rows.unlink()

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        if not self._settings.exists():
            raise ValueError(
                f"expected {self._settings}, which says how {self.path} was written, got no such file: write to a new file."
            )
        try:
            before = json.loads(self._settings.read_text(encoding="utf-8"))
        except (RecursionError, ValueError):
            before = None
        if not isinstance(before, dict):
            raise ValueError(
                f"expected {self._settings}, which says how {self.path} was written, got what cannot be read: write to a "
                "new file."
            )
        if differences := find_differences(before, settings):
            raise ValueError(
                f"expected the settings that {self.path} was begun with, got others ({'; '.join(differences)}): go on with "
                "the former, or write to a new file."
            )


def find_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Compare settings that were read from JSON with those of this run.

    Args:
        before: The ones that were read.
        now: The ones to compare with, as JSON can hold them.

    Returns:
        For each that differs its name and both values.
    """
    now = json.loads(json.dumps(now))
    return [
        f"{name} {before.get(name)!r}, now {now.get(name)!r}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]


@contextmanager
def say_how_to_go_on(path: Path, how: str = "run the same again") -> Iterator[None]:
    """Tell, of what cannot be written inside of the `with` block, that what is there is kept.

    Args:
        path: What is written.
        how: How to go on.

    Raises:
        OSError: In place of the one that the block raises.
    """
    try:
        yield
    except Exception as error:
        # Writers of weights have errors of their own for a full disk
        is_full = "No space left" in str(error) or "PytorchStreamWriter" in str(error)
        if not (is_full or isinstance(error, OSError)):
            raise
        is_forbidden = getattr(error, "errno", None) in _FORBIDDEN
        advice = "see to it that it can be written to" if is_forbidden else "make room"
        raise OSError(
            f"could not write to {path} ({getattr(error, 'strerror', None) or error}). What was written before is kept: "
            f"{advice}, and {how} to go on."
        ) from error


def _to_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_whole(path: Path, lines: Iterable[str]) -> None:
    """Write a file that is there either whole or not at all.

    Args:
        path: Path of the file.
        lines: Its lines, each with its end.

    Raises:
        OSError: If it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    with say_how_to_go_on(path), part.open("wb") as file:
        file.writelines(line.encode() for line in lines)
    part.replace(path)


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = shorten(str(error), 300)
        raise ValueError(
            f"expected Parquet in {path}, got what cannot be read: {reason}; write to a new file."
        ) from error


def _write_parquet(rows: Iterator[dict[str, Any]], path: Path) -> None:
    import pyarrow.parquet

    part = path.with_name(path.name + ".part")
    table = pyarrow.Table.from_pylist(list(islice(rows, 1000)))
    with pyarrow.parquet.ParquetWriter(part, table.schema) as writer:
        while len(table):
            writer.write_table(table)
            table = pyarrow.Table.from_pylist(list(islice(rows, 1000)), table.schema)
    part.replace(path)
