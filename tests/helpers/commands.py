"""Running the command `fspad` in this process."""

import re

from typer.testing import CliRunner

from fspad.cli import app


def run(*arguments: object):
    """What `fspad` with these arguments printed, and its exit code."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def plain(text: str) -> str:
    """Text without colours and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())
