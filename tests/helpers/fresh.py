"""Fresh Python processes at the price of a fork: their server has imported torch and transformers, and nothing of fspad.

Importing these takes longer than most of what is tried in such processes. They see no network, and remote code goes to
the folder `modules` where they run.
"""

import multiprocessing
import os
import sys
import tempfile
import types
from collections.abc import Mapping
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "transformers.modeling_utils", "transformers.pipelines"])


def start(
    script: str, folder: Path, log: Path, *arguments: object, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Start a fresh process.

    Args:
        script: What it runs.
        folder: Where it runs.
        log: What it prints goes to files of this name and the suffixes `.out` and `.err`.
        *arguments: Arguments of the script.
        environment: Variables, beside those of this process. Those that torch, transformers and huggingface_hub read
            when they are imported have no effect.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MODULES_CACHE", "modules")
        patch.setenv("HF_HUB_OFFLINE", "1")
        forkserver.ensure_running()
    process = _CONTEXT.Process(
        target=_run, args=(script, str(folder), str(log), [str(a) for a in arguments], dict(environment or {}))
    )
    process.start()
    return process


def run(script: str, folder: Path, *arguments: object, environment: Mapping[str, str] | None = None) -> str:
    """Run a script in a fresh process, and return what it printed.

    Args:
        script: What it runs.
        folder: Where it runs.
        *arguments: Arguments of the script.
        environment: As of [`start`].
    """
    with tempfile.TemporaryDirectory() as logs:
        log = Path(logs) / "log"
        process = start(script, folder, log, *arguments, environment=environment)
        process.join()
        assert process.exitcode == 0, log.with_suffix(".err").read_text()
        return log.with_suffix(".out").read_text()


def _run(script: str, folder: str, log: str, arguments: list[str], environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ |= environment
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log + suffix, os.O_WRONLY | os.O_CREAT), number)
    # Where the process that asks for this one keeps remote code, this one must not look for it
    sys.path[:] = ["", *(path for path in sys.path if not Path(path, "transformers_modules").is_dir())]
    sys.argv = ["-c", *arguments]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(script, "<script>", "exec"), main.__dict__)
