"""Files of dialogues, looked at before they are given to `datasets`."""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path

# Rows of dialogues are a few levels deep. Arrow's parser recurses, and ends the process in a row of very many
MOST_LEVELS = 100
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]')


def check_nesting(path: Path) -> None:
    """Refuse a file of JSON lines with a row that is nested too deeply to be a dialogue.

    Args:
        path: The file, maybe gzipped.

    Raises:
        OSError: If it cannot be read.
        ValueError: If there is such a row.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    with opener(path, "rb") as file:
        try:
            for number, line in enumerate(file, start=1):  # noqa: B007
                # Text may hold brackets, so that these are counted one by one only where there are many
                if line.count(b"[") + line.count(b"{") > MOST_LEVELS and _depth(line) > MOST_LEVELS:
                    break
            else:
                return
        except (EOFError, gzip.BadGzipFile, zlib.error):
            return  # what is wrong with it is said when it is loaded
    raise ValueError(f"{path}:{number}: expected a dialogue, got a row of more than {MOST_LEVELS} levels")


def _depth(line: bytes) -> int:
    depth = deepest = 0
    for match in _BRACKETS.finditer(line):
        sign = match[0]
        if sign in (b"[", b"{"):
            depth += 1
            deepest = max(deepest, depth)
            if deepest > MOST_LEVELS:
                break
        elif sign in (b"]", b"}"):
            depth -= 1
    return deepest
