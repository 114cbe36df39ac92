"""What of a training goes to the Hub, and how: heads with their cards, and neither tokenizers nor pickles."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress, hf_api

from fspad.hub_cards import push_folder
from fspad.hub_cards.staging import HEAD_FILES, NOT_HEAD_FILES

from .cards import make_card

if TYPE_CHECKING:
    from concurrent.futures import Future

    from huggingface_hub import CommitInfo

    from fspad.hub_cards import FSPADModelCard

    from .training_arguments import FSPADTrainingArguments

logger = logging.get_logger(__name__)

ARGUMENTS_NAME = "training_args.json"


def readable_arguments(args: FSPADTrainingArguments) -> dict[str, Any]:
    """The training arguments without those that tell of a machine or an account.

    Args:
        args: The arguments.

    Returns:
        Names and values that JSON can hold.
    """
    return {
        name: value
        for name, value in args.to_dict().items()
        if not name.startswith(("hub_", "push_to_hub")) and not (isinstance(value, str) and os.path.isabs(value))
    }


class PushingMixin:
    """Saves and pushes the heads of a [`~transformers.Trainer`]."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            # Nothing reads the pickle, and to look into it a stranger would have to run it.
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            arguments = json.dumps(readable_arguments(self.args), indent=2, sort_keys=True)
            (folder / ARGUMENTS_NAME).write_text(arguments + "\n", encoding="utf-8")

    def make_model_card(self, **facts: Any) -> FSPADModelCard | None:
        """The card of the head as it is now.

        Args:
            **facts: What the trainer does not know, as in [`~fspad.trainer.cards.make_card`], e.g. `license`, `dataset`
                or `measurements`.

        Returns:
            The card, or `None` for an adapter of a head, whose card PEFT writes.
        """
        if getattr(self.model, "active_peft_config", None) is not None:
            return None
        return make_card(self, **facts)

    def create_model_card(self, **facts: Any) -> None:
        """Write the card of the head to the output folder, with plots if there is matplotlib.

        Args:
            **facts: As in [`make_model_card`].
        """
        card = self.make_model_card(**facts)
        if card is not None and self.is_world_process_zero():
            card.save(self.args.output_dir)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        create_pr: bool = False,
        **facts: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Save the head and push it: first its files, then the card that pins them.

        Args:
            commit_message: Summary of the commit of the files.
            blocking: Whether to wait until the push is done.
            token: Token of the Hub; by default `args.hub_token`.
            revision: Branch to push to; by default `args.hub_revision`.
            private: Whether a new repository is private; by default `args.hub_private_repo`.
            create_pr: Whether to open a pull request instead.
            **facts: As in [`make_model_card`].

        Returns:
            The commit of the files, or with `blocking=False` its future; `None` on all processes but the first.

        Raises:
            Exception: As in [`~fspad.hub_cards.push_folder`]. The output folder holds the whole head then.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # On all processes: each may hold a part of the head
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        push = (
            push_folder if blocking else lambda *args, **kwargs: hf_api().run_as_future(push_folder, *args, **kwargs)
        )
        return push(
            self.args.output_dir,
            self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
            card=self.make_model_card(**facts),
            commit_message=commit_message,
            token=token if token is not None else self.args.hub_token,
            revision=None if create_pr else revision or self.args.hub_revision,
            private=private if private is not None else self.args.hub_private_repo,
            create_pr=create_pr,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the head while training goes on, and with some strategies the whole checkpoint to resume from."""
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        path_in_repo = None
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            path_in_repo = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else Path(checkpoint_folder).name
        when = f"epoch {int(self.state.epoch)}"
        if self.args.save_strategy == SaveStrategy.STEPS:
            when = f"step {self.state.global_step}"
        # A copy, because the checkpoint may be deleted before its turn to be uploaded comes
        staged = Path(tempfile.mkdtemp(prefix="_push-", dir=self.args.output_dir))
        shutil.copytree(checkpoint_folder, staged, dirs_exist_ok=True)
        job = hf_api().run_as_future(self._push_staged, staged, f"Training in progress, {when}", path_in_repo)
        if is_busy:
            self.push_in_progress.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])

    def _push_staged(self, staged: Path, commit_message: str, path_in_repo: str | None) -> None:
        """Push the head in a copy of a checkpoint, maybe the whole checkpoint too, and delete the copy."""
        common = {"repo_id": self.hub_model_id, "token": self.args.hub_token, "revision": self.args.hub_revision}
        try:
            hf_api().upload_folder(
                folder_path=staged,
                allow_patterns=list(HEAD_FILES),
                ignore_patterns=list(NOT_HEAD_FILES),
                commit_message=commit_message,
                **common,
            )
            if path_in_repo is not None:
                hf_api().upload_folder(
                    folder_path=staged,
                    path_in_repo=path_in_repo,
                    commit_message=f"{commit_message}, checkpoint",
                    **common,
                )
        except Exception as error:
            # Training is worth more than one push, and the next one sends what is missing
            logger.warning(f"Not pushed: {commit_message!r} ({error!r}). Training goes on.")
        finally:
            shutil.rmtree(staged, ignore_errors=True)
