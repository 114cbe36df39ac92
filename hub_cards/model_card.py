"""The model card of a head: what is known about it, as front matter and as text. What is unknown is left out."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from jinja2 import Template

from fspad import FSPADConfig
from fspad.provenance import as_hub_id
from fspad.versions import OLDEST_TESTED

from .measurement import Measurement, acceptance_table, results_table, shared_setup
from .training import Training

TEMPLATE = Path(__file__).with_name("model_card_template.md")
USE_TEMPLATE = Path(__file__).with_name("use_template.md")
# Around the part of a card that says where the head is, so that a push can write it anew
BEGIN_USE, END_USE = "<!-- how to use the head where it is -->", "<!-- end of how to use the head -->"
_USE = re.compile(f"{re.escape(BEGIN_USE)}.*{re.escape(END_USE)}", re.DOTALL)
TAGS = ("speculative-decoding", "draft-model", "fspad", "arxiv:2408.15562")


@dataclass
class FSPADModelCard:
    """Model card of an FSPAD head.

    Args:
        head_config: Configuration of the head.
        repo_id: Repository of the head on the Hub; `None` for a head in a folder.
        revision: Commit that the snippet pins.
        path: Folder of a head without a repository, relative to where the snippet is run.
        target: Hub id of the target; by default what the head's configuration says, if that is a Hub id.
        target_revision: Revision of the target; by default that of the head's configuration.
        target_weights: Which weights of the target were used for training and measuring, if not the Hub's own.
        training: How the head was trained.
        measurements: What was measured, in the order of the table.
        license: Identifier of the head's license, as the Hub spells it.
        license_note: Where the license comes from: those of the target and of the training data.
        datasets: Hub ids of the training data.
        language: Codes of the languages of the text, as the Hub spells them.
        tags: Tags beside those that every head has.
        model_name: Name of the head in the model index; by default the end of its repository or path.

    Raises:
        ValueError: If an id is no Hub id, the path is absolute, or there is a revision without a repository.
    """

    head_config: FSPADConfig
    repo_id: str | None = None
    revision: str | None = None
    path: str | None = None
    target: str | None = None
    target_revision: str | None = None
    target_weights: str | None = None
    training: Training | None = None
    measurements: Sequence[Measurement] = ()
    license: str | None = None
    license_note: str | None = None
    datasets: Sequence[str] = ()
    language: str | Sequence[str] | None = None
    tags: Sequence[str] = ()
    model_name: str | None = None

    def __post_init__(self) -> None:
        for repo_id in (self.repo_id, self.target, *self.datasets):
            if repo_id is not None:
                validate_repo_id(repo_id)
        if self.revision is not None and self.repo_id is None:
            raise ValueError(f"expected a repo_id with the revision {self.revision!r}, got None: name the repository.")
        if self.path is not None and Path(self.path).is_absolute():
            raise ValueError(f"expected a path that holds on other machines, got {self.path!r}: make it relative.")
        recorded = self.head_config.target_model_name
        if self.target is None:
            self.target = as_hub_id(recorded)
        # The recorded revision is one of the recorded target, and of no other.
        if self.target is not None and self.target_revision is None and self.target == recorded:
            self.target_revision = self.head_config.target_revision

    def data(self) -> ModelCardData:
        """The front matter."""
        results = [result for measurement in self.measurements for result in measurement.eval_results()]
        name = self.model_name or (self.repo_id or self.path or "fspad-head").rstrip("/").rsplit("/", 1)[-1]
        return ModelCardData(
            base_model=self.target,
            base_model_relation=None if self.target is None else "adapter",
            library_name="transformers",
            pipeline_tag="text-generation",
            license=self.license,
            datasets=list(self.datasets) or None,
            language=self.language if self.language is None or isinstance(self.language, str) else list(self.language),
            tags=list(dict.fromkeys([*TAGS, *self.tags])),
            model_name=name if results else None,
            eval_results=results or None,
        )

    def render(self, plots: Collection[str] = ()) -> ModelCard:
        """The whole card; `str` of it is the text, with the front matter.

        Args:
            plots: Names of the plots, of those that `save` draws, which are beside the card.

        Returns:
            The card.
        """
        training = self.training or Training()
        card = ModelCard.from_template(
            self.data(),
            template_path=str(TEMPLATE),
            card=self,
            config=self.head_config,
            use=self.use(),
            training_facts=training.facts(),
            evaluations_table=training.evaluations_table(),
            results_table=results_table(self.measurements),
            shared_setup=shared_setup(self.measurements),
            acceptance_table=acceptance_table(self.measurements),
            plots=plots,
        )
        card.text += "\n"  # Jinja drops the newline at the end of a template
        return card

    def use(self) -> str:
        """The part of the card that says how to use the head where it is, between two comments."""
        oldest = ".".join(map(str, OLDEST_TESTED))
        text = Template(USE_TEMPLATE.read_text(encoding="utf-8")).render(card=self, oldest_transformers=oldest)
        return f"{BEGIN_USE}\n\n{text}\n\n{END_USE}"

    def save(self, folder: str | Path) -> Path:
        """Write `README.md` and its plots into the folder of the head; `ModelCard.load` reads it again.

        Args:
            folder: The folder.

        Returns:
            Path of the card. Without matplotlib it has no plots.
        """
        path = Path(folder) / "README.md"
        plots = []
        if importlib.util.find_spec("matplotlib") is not None:
            from .plots import draw_plots

            plots = draw_plots(self, path.parent)
        self.render(plots).save(path)
        return path


def moved_card(
    text: str, head_config: FSPADConfig, repo_id: str, revision: str | None, target_revision: str | None = None
) -> str:
    """A card with the part written anew that says where the head is.

    Args:
        text: The card, with its front matter.
        head_config: Configuration of the head.
        repo_id: Repository that the head is in now.
        revision: Commit that the snippets pin.
        target_revision: Revision of the target, if it is another one than the head's configuration says.

    Returns:
        The card. One that was not made by [`FSPADModelCard`] has no such part and stays as it is.
    """
    if not _USE.search(text):
        return text
    target = ModelCard(text, ignore_metadata_errors=True).data.base_model
    target = target if isinstance(target, str) else None
    card = FSPADModelCard(
        head_config, repo_id=repo_id, revision=revision, target=target, target_revision=target_revision
    )
    use = card.use()
    return _USE.sub(lambda _: use, text)
