"""Pushes a head to the Hub in two commits: first its files, then the card, whose snippets pin the first commit."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import logging

import fspad
from fspad import FSPADConfig

from .model_card import FSPADModelCard, moved_card
from .staging import HEAD_FILES, NOT_HEAD_FILES, name_repository, staged

if TYPE_CHECKING:
    from fspad import FSPADModel

logger = logging.get_logger(__name__)

# Seconds between attempts. Uploads of single files are tried again by huggingface_hub itself.
WAITS = (1, 2, 4)
TRANSIENT_STATUS_CODES = (408, 429, 500, 502, 503, 504)
# Base class of all errors of the HTTP client, which is not the same library in all releases of huggingface_hub
HTTPError = HfHubHTTPError.__bases__[0]


def push_head(
    head: FSPADModel,
    repo_id: str,
    *,
    card: FSPADModelCard | None = None,
    max_shard_size: int | str = "50GB",
    tags: str | Sequence[str] | None = None,
    **options: Any,
) -> CommitInfo:
    """Push a head with its code and its card. This is what `head.push_to_hub` calls.

    Args:
        head: The head.
        repo_id: Repository on the Hub, which is created if need be.
        card: The card; by default one with what the head's configuration tells. Its `repo_id` and `revision` are set.
        max_shard_size: As in [`~transformers.PreTrainedModel.save_pretrained`].
        tags: Further tags of the card.
        **options: As in [`push_folder`].

    Returns:
        The commit of the files, which the card pins.

    Raises:
        Exception: As in [`push_folder`]. The head stays in a temporary folder then.
    """
    tags = [tags] if isinstance(tags, str) else tags or ()
    if not head._hf_peft_config_loaded:  # otherwise only the adapter is saved
        card = FSPADModelCard(head.config) if card is None else card
        card = replace(card, tags=list(dict.fromkeys([*card.tags, *(head.model_tags or ()), *tags])))
    folder = Path(tempfile.mkdtemp(prefix="fspad-head-"))
    head.save_pretrained(folder, max_shard_size=max_shard_size)
    commit = push_folder(folder, repo_id, card=card, **options)
    shutil.rmtree(folder)
    return commit


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    card: FSPADModelCard | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Push the folder of a saved head: first its files, then the card that pins them.

    The head is loaded first, and its code is added if the folder lacks it, as that of a checkout does. Connections that
    fail are tried again a few times. After a failure for good the folder is complete, and the error tells how to go on; what
    has arrived is not sent again.

    Args:
        folder: The folder. Only what belongs to a head is pushed: no tokenizer, no checkpoints, no pickles.
        repo_id: Repository on the Hub, which is created if need be.
        card: The card, pushed as `README.md` with the repository and the commit of the files; without a license it gets that
            of the target, if the Hub tells. By default the folder's own, in which only the part that says where the head is
            is written anew (a card of your own has none, and is pushed as it is), or if it has none, one with what the
            head's configuration tells.
        commit_message: Summary of the commit of the files; by default "Upload FSPAD head".
        commit_description: Description of the commit of the files.
        private: Whether a new repository is private; by default what the account prefers.
        token: Token of the Hub; by default the one of `hf auth login`.
        revision: Branch to push to, which is created if need be; by default the main one.
        create_pr: Whether to open a pull request with both commits instead.

    Returns:
        The commit of the files, which the card pins.

    Raises:
        FileNotFoundError: If the folder has no `config.json`.
        ValueError: If the head cannot be loaded, or both `create_pr` and `revision` are given.
        Exception: What huggingface_hub raises when it gives up, with a note how to go on.
    """
    folder = Path(folder)
    commit_message = commit_message or "Upload FSPAD head"
    if create_pr and revision is not None:
        raise ValueError(f"expected create_pr or a revision to push to, got both: drop revision={revision!r}.")
    api = HfApi(library_name="fspad", library_version=fspad.__version__, token=token)
    with staged(folder) as (copy, config):
        card = _prepare_card(api, copy, config, card, repo_id)
        where = {"repo_id": repo_id, "revision": revision, "create_pr": create_pr}
        try:
            _make_place(api, where, private)
            files = _upload_files(api, copy, where, commit_message, commit_description)
            _upload_card(api, copy, card, config, where, files.oid, f"{commit_message}: model card")
        except Exception as error:
            if card is not None:  # so that the folder is all there is to go on with
                (folder / "README.md").unlink(missing_ok=True)  # maybe a link into a cache
                card.save(folder)
            error.add_note(_how_to_go_on(folder, private=private, **where))
            raise
    return files


def _prepare_card(
    api: HfApi, copy: Path, config: FSPADConfig | None, card: FSPADModelCard | None, repo_id: str
) -> FSPADModelCard | None:
    """Save the card that is to be pushed; `None` if that is the folder's own."""
    if card is None:
        if config is None or (copy / "README.md").is_file():
            return None
        card = FSPADModelCard(config)
    card = _with_license_of_target(api, replace(card, repo_id=repo_id, revision=None, path=None))
    card.save(copy)
    return card


def _make_place(api: HfApi, where: dict[str, Any], private: bool | None) -> None:
    """Create repository and branch if need be; in `where`, the repository's name gets its owner."""
    where["repo_id"] = _with_retries(api.create_repo, where["repo_id"], private=private, exist_ok=True).repo_id
    revision = where["revision"]
    if revision is not None and not revision.startswith("refs/"):
        _with_retries(api.create_branch, where["repo_id"], branch=revision, exist_ok=True)


def _upload_files(
    api: HfApi, copy: Path, where: dict[str, Any], commit_message: str, commit_description: str | None
) -> CommitInfo:
    """Push all but the card; if that opens a pull request, `where` is its branch from then on."""
    if (copy / "custom_generate").is_dir():
        name_repository(copy, where["repo_id"])
    commit = _with_retries(
        api.upload_folder,
        may_repeat=not where["create_pr"],
        folder_path=copy,
        allow_patterns=list(HEAD_FILES),
        ignore_patterns=["README.md", *NOT_HEAD_FILES],
        commit_message=commit_message,
        commit_description=commit_description,
        **where,
    )
    if commit.pr_revision is not None:
        where |= {"revision": commit.pr_revision, "create_pr": False}
    return commit


def _upload_card(
    api: HfApi,
    copy: Path,
    card: FSPADModelCard | None,
    config: FSPADConfig | None,
    where: dict[str, Any],
    commit: str,
    commit_message: str,
) -> None:
    if not (copy / "README.md").is_file():  # an adapter whose card was taken away
        return
    text = (copy / "README.md").read_text(encoding="utf-8")
    if config is not None:
        target_revision = None if card is None else card.target_revision
        text = moved_card(text, config, where["repo_id"], commit, target_revision)
    _with_retries(
        api.upload_file,
        may_repeat=not where["create_pr"],
        path_or_fileobj=text.encode(),
        path_in_repo="README.md",
        commit_message=commit_message,
        **where,
    )


def _with_license_of_target(api: HfApi, card: FSPADModelCard) -> FSPADModelCard:
    """The card with the license of the target, whose text a head was made from, if it has none and the Hub tells."""
    if card.license is not None or card.target is None:
        return card
    try:
        data = api.model_info(card.target, revision=card.target_revision).card_data
    except (HTTPError, OSError):
        return card
    if not isinstance(license := getattr(data, "license", None), str):
        return card
    return replace(card, license=license, license_note=card.license_note or "That of the target.")


def _with_retries(call: Callable[..., Any], *args: Any, may_repeat: bool = True, **kwargs: Any) -> Any:
    """Call the Hub, and again after some waits while it fails in a way that may pass.

    Not everything may be repeated: if only the answer got lost, a second pull request would be opened. A second commit
    is harmless, since huggingface_hub leaves out what has arrived.
    """
    for wait in WAITS if may_repeat else ():
        try:
            return call(*args, **kwargs)
        except HTTPError as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code not in TRANSIENT_STATUS_CODES:
                raise
            logger.warning(f"The Hub failed ({error!r}); trying again in {wait} s.")
            time.sleep(wait)
    return call(*args, **kwargs)


def _how_to_go_on(folder: Path, repo_id: str, **options: Any) -> str:
    arguments = [repr(str(folder.resolve())), repr(repo_id)]
    arguments += [f"{name}={value!r}" for name, value in options.items() if value]
    return (
        f"The head was not pushed, or not all of it, but is complete in {folder.resolve()}. Push again, which sends only "
        "what is missing, or in another process: "
        f"`from fspad.hub_cards import push_folder; push_folder({', '.join(arguments)})`."
    )
