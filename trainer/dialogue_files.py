"""Files of dialogues, looked at before they are given to `datasets`."""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path

# Rows of dialogues are a few levels deep, and have a few keys, each of which becomes a column
MOST_LEVELS = 100
MOST_KEYS = 1000
_TEXT = rb'"(?:[^"\\]++|\\.)*+"'
_BRACKETS = re.compile(_TEXT + rb"|[\[\]{}]")
_KEY = re.compile(_TEXT + rb"\s*(:?)")
_SCALAR = re.compile(rb"\s*(?:null|true|false|-?\d[\d.eE+-]*|" + _TEXT + rb")\s*")


def check_rows(path: Path) -> None:
    """Refuse rows of JSON lines that are no dictionaries, or have too many levels or keys to be dialogues.

    Arrow's parser does not survive some of them (the process ends without a message) and takes very long for others.

    Args:
        path: The file, maybe gzipped. One that begins with a list is looked at for its depth only.

    Raises:
        OSError: If it cannot be read.
        ValueError: If there is such a row.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    is_list = None
    with opener(path, "rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                if is_list is None and line.strip():
                    is_list = line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
                if not is_list and _SCALAR.fullmatch(line):
                    raise ValueError(f"{path}:{number}: expected a dialogue as a dictionary, got {line[:50]!r}")
                # Text may hold brackets, so that these are counted one by one only where there are many
                if line.count(b"[") + line.count(b"{") > MOST_LEVELS and _depth(line) > MOST_LEVELS:
                    raise ValueError(
                        f"{path}:{number}: expected a dialogue, got a row of more than {MOST_LEVELS} levels"
                    )
                if line.count(b":") > MOST_KEYS and _num_keys(line) > MOST_KEYS:
                    raise ValueError(f"{path}:{number}: expected a dialogue, got a row of more than {MOST_KEYS} keys")
        except (EOFError, gzip.BadGzipFile, zlib.error):
            return  # what is wrong with it is said when it is loaded


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


def _num_keys(line: bytes) -> int:
    """How many different keys the dictionaries of a row have."""
    return len({match[0] for match in _KEY.finditer(line) if match[1]})
