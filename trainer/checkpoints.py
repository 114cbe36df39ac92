"""Which checkpoint to go on from."""

from __future__ import annotations

import json
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME


def find_checkpoint(output_dir: str, wanted: str | bool | None) -> str | None:
    """Find the checkpoint to go on from. Of a run that was killed, the last one may be half written.

    Args:
        output_dir: Folder of the checkpoints.
        wanted: A checkpoint's folder, `True` for the last whole one, `None` or `False` for none; or these as words, as
            a command line gives them.

    Returns:
        Its folder, or `None` to begin anew.

    Raises:
        ValueError: If there is no such checkpoint, or it is not whole.
    """
    word = str(wanted).lower()
    if word in ("none", "false"):
        return None
    if word != "true":
        if not _is_whole(Path(wanted)):
            raise ValueError(
                f"expected the folder of a whole checkpoint, got {wanted}; `true` as resume_from_checkpoint takes the last "
                f"one in {output_dir}."
            )
        return str(wanted)
    whole = [path for path in Path(output_dir).glob("checkpoint-*") if _is_whole(path)]
    if not whole:
        raise ValueError(
            f"expected a whole checkpoint in {output_dir}, got none; leave out resume_from_checkpoint to begin anew."
        )
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2])))


def _is_whole(checkpoint: Path) -> bool:
    # The trainer writes this file after all others.
    try:
        return "global_step" in json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
