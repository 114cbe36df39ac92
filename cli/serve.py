"""`fspad serve`: a target and its head behind vLLM's OpenAI-compatible server."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from fspad.bench.smollm2 import TARGET_NAME, keep_dequantised
from fspad.provenance import as_hub_id
from fspad.serving.server import check_installed, check_port, run_server, server_command

from .export import export_head
from .loading import find_shipped_head


def serve(
    target: str | None,
    head: str | None,
    revision: str | None,
    num_draft_tokens: int,
    host: str,
    port: int,
    log: Path | None,
    extra: Sequence[str],
    tell: Callable[[str], None],
    is_plain: bool = False,
) -> int:
    """Serve a target with a head until it is stopped.

    Args:
        target: Folder or Hub id of the target; by default the one that the head was trained for.
        head: Folder or Hub id of the head; by default the one of this checkout.
        revision: Revision of the head on the Hub.
        num_draft_tokens: Tokens drafted in a step.
        host: Address to listen on.
        port: Port to listen on.
        log: File for what the server prints.
        extra: Further arguments of vLLM.
        tell: What to tell with.
        is_plain: Whether to serve the target alone, to compare with.

    Returns:
        Exit status of the server.

    Raises:
        ImportError: If there is no vLLM.
        OSError: If the port is not free.
        ValueError: If there is no head, or it does not say which target it is for.
    """
    check_installed()
    check_port(host, port)
    with tempfile.TemporaryDirectory(prefix="fspad-serve-") as folder:
        exported = Path(folder) / "head"
        loaded = export_head(str(head or find_shipped_head()), exported, revision)
        name = target or as_hub_id(loaded.config.target_model_name or "")
        if name is None:
            raise ValueError(
                f"expected a head that records the Hub id of its target, got {loaded.config.target_model_name!r}: name the "
                "target."
            )
        # Its weights are here without the Hub
        model = str(keep_dequantised()) if target is None and name == TARGET_NAME else name
        drafts = "without a head" if is_plain else f"with drafts of {num_draft_tokens} tokens"
        tell(f"Serving {name} {drafts}; vLLM takes a minute to start, the first time several ...")
        command = server_command(model, None if is_plain else exported, num_draft_tokens, host, port, name, extra)
        return run_server(command, f"http://{host}:{port}", tell, log)
