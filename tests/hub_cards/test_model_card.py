"""The text of model cards: nothing in it that is not known."""

import re
import sys
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index

import fspad
from fspad.hub_cards import Evaluation, FSPADModelCard, Training
from helpers.cards import (
    CARDS,
    CONFIG,
    GREEDY,
    OTHER,
    SHA,
    TARGET,
    TARGET_SHA,
    TRAINING,
    WHERE,
    bare_card,
    full_card,
    hub_card,
)


@CARDS
def test_front_matter_is_read_back_equal(make, tmp_path):
    rendered = make().render()
    path = make().save(tmp_path)
    assert path == tmp_path / "README.md"
    assert path.read_text(encoding="utf-8") == str(rendered)
    again = ModelCard.load(path)
    assert again.data.to_dict() == rendered.data.to_dict() == make().data().to_dict()
    assert again.text == rendered.text
    assert again.data.eval_results == make().data().eval_results


@CARDS
def test_markdown_is_tidy(make):
    text = str(make().render())
    assert not re.search(r"[ \t]+$", text, re.MULTILINE)
    assert "\n\n\n" not in text
    assert text.endswith("```\n")
    assert not re.search(r"^#.*\n(?!\n)", make().render().text, re.MULTILINE)
    for unknown in ("None", "N/A", "nan", "unknown", "{{", "{%"):
        assert unknown not in text


def test_front_matter():
    data = full_card().data().to_dict()
    index = data.pop("model-index")
    assert data == {
        "base_model": TARGET,
        "base_model_relation": "adapter",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "datasets": ["openai/gsm8k"],
        "tags": ["speculative-decoding", "draft-model", "fspad", "arxiv:2408.15562"],
    }
    assert index == eval_results_to_model_index("small", full_card().data().eval_results)


def test_model_index_has_one_result_a_measurement():
    (index,) = full_card().data().to_dict()["model-index"]
    assert index["name"] == "small"
    greedy, other, sampled = index["results"]
    assert greedy["dataset"] == {
        "name": "Held-out prompts",
        "type": "held-out-prompts",
        "config": f"temperature=0, num_prompts=200, dtype=bfloat16, threads=2, machine={WHERE['machine']}",
    }
    assert [(m["type"], m["value"]) for m in greedy["metrics"]] == [("tau", 2.35), ("speedup", 1.5)]
    assert [(m["type"], m["value"]) for m in other["metrics"]] == [("tau", 3.0)]
    assert other["dataset"]["config"] == "temperature=0"
    assert sampled["dataset"]["config"].startswith("temperature=1,")


def test_a_card_with_nothing_known_but_the_config():
    card = bare_card().render()
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["speculative-decoding", "draft-model", "fspad", "arxiv:2408.15562"],
    }
    headings = re.findall(r"^#+ (.*)", card.text, re.MULTILINE)
    uses = ["Use", "As the assistant of `generate`", "In a pipeline"]
    assert headings == ["FSPAD draft head", *uses, "The head", "What lossless means", "Limits", "Citation"]
    assert "**Not a stand-alone model: a draft head for its target.**" in card.text
    assert "- Target: a model without a name on the Hub, of hidden size" in card.text
    assert "revision" not in card.text
    assert "checkout" not in card.text
    assert "|" not in card.text
    assert "tau" not in card.text


def test_title_and_first_line_name_the_target():
    lines = [line for line in hub_card().render().text.splitlines() if line]
    assert lines[0] == f"# FSPAD draft head for {TARGET}"
    assert lines[1] == f"**Not a stand-alone model: a draft head for [{TARGET}](https://huggingface.co/{TARGET}).**"
    assert f"- Target: [{TARGET}](https://huggingface.co/{TARGET}), revision `{TARGET_SHA}`" in lines


@pytest.mark.parametrize(("sampling", "alignment"), [(True, True), (True, False), (False, True), (False, False)])
def test_variant_and_drafting_knobs(sampling, alignment):
    switches = {"feature_sampling": sampling, "partial_alignment": alignment}
    config = fspad.FSPADConfig(**{**CONFIG.to_dict(), **switches, "draft_depth": 3, "num_draft_tokens": 17})
    text = str(FSPADModelCard(config).render())
    assert (
        f"- Feature sampling: {'on' if sampling else 'off'}\n- Partial alignment: {'on' if alignment else 'off'}\n"
        in text
    )
    assert ("EAGLE-1/2" in text) == (not sampling and not alignment)
    assert "- `draft_depth`: 3 levels" in text
    assert "- `draft_top_k`: 8 nodes" in text
    assert "- `num_draft_tokens`: 17 drafted tokens" in text
    assert "- Draft vocabulary: all 97 tokens of the target\n" in text
    assert "outside of the draft vocabulary" not in text


def test_a_trimmed_draft_vocabulary_is_a_limit():
    text = str(full_card().render())
    assert "- Draft vocabulary: 50 of the target's 97 tokens\n" in text
    assert "Tokens outside of the draft vocabulary are drafted only if they are in the prompt" in text


def test_training():
    text = str(full_card().render())
    section = text.split("## Training\n")[1].split("\n## ")[0]
    assert section.splitlines() == [
        "",
        "- Data: Prompts answered by the target",
        "- Dialogues: 4,000",
        "- Answer tokens: 1,234,567",
        "- Optimizer steps: 2,000",
        "- Epochs: 8",
        "- Positions in the loss: answers only",
        "- Hyperparameters: `learning_rate=0.0005`",
        "- Hardware: 2 CPU cores",
        "- Versions: torch 2.13.0",
    ]


def test_training_without_any_field_has_no_heading():
    assert "Training" not in str(FSPADModelCard(CONFIG, training=Training()).render())
    card = FSPADModelCard(CONFIG, training=Training(steps=0))
    assert "## Training\n\n- Optimizer steps: 0\n\n## What" in str(card.render())


def test_results_table():
    text = str(full_card().render())
    table = [line for line in text.splitlines() if line.startswith("|")]
    machine = WHERE["machine"].replace("|", "\\|")
    assert table == [
        "| Prompts | Number | Temperature | tau | Speedup | Tokens/s | Machine | Dtype | Threads |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        f"| Held-out prompts | 200 | 0 (greedy) | 2.35 | 1.50x | 43.2 | {machine} | bfloat16 | 2 |",
        "| Spec-Bench: math |  | 0 (greedy) | 3.00 |  |  |  |  |  |",
        f"| Held-out prompts | 200 | 1 | 2.00 | 1.25x | 43.2 | {machine} | bfloat16 | 2 |",
    ]
    assert "*tau* is the mean" in text
    assert "*Speedup* is the ratio" in text
    assert "Measured with:" not in text
    assert "Same as plain" not in text
    assert "Acceptance by depth" not in text


def test_columns_that_nobody_fills_are_left_out():
    text = str(FSPADModelCard(CONFIG, measurements=[OTHER]).render())
    assert "| Prompts | Temperature | tau |\n| --- | --- | --- |\n| Spec-Bench: math | 0 (greedy) | 3.00 |\n" in text
    assert "*Speedup*" not in text


def test_license_section():
    assert "## License\n\n`apache-2.0`\n\nInherited from the target.\n\n## Citation" in str(full_card().render())
    assert "## License\n\nA note.\n\n##" in str(FSPADModelCard(CONFIG, license_note="A note.").render())
    assert "## License\n\n`mit`\n\n##" in str(FSPADModelCard(CONFIG, license="mit").render())


def test_the_target_of_the_config_is_used_only_if_it_is_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "target").mkdir(parents=True)

    def card(name: str, **known: str) -> FSPADModelCard:
        values = {**CONFIG.to_dict(), "target_model_name": name, "target_revision": TARGET_SHA}
        return FSPADModelCard(fspad.FSPADConfig(**values), **known)

    assert (card(TARGET).target, card(TARGET).target_revision) == (TARGET, TARGET_SHA)
    for folder in (str(tmp_path / "models" / "target"), "models/target", "./models/target"):
        text = str(card(folder).render())
        assert "models" not in text
        assert TARGET_SHA not in text
        assert "base_model" not in text
    assert card("models/target", target=TARGET).target_revision is None


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"repo_id": "not an id"}, "not an id"),
        ({"target": "/data/target"}, "/data/target"),
        ({"datasets": ["a/b/c"]}, "a/b/c"),
        ({"revision": SHA}, "name the repository"),
        ({"path": "/data/head"}, "make it relative"),
    ],
)
def test_what_must_not_be_in_a_card_is_refused(known, message):
    with pytest.raises(ValueError, match=message):
        FSPADModelCard(CONFIG, **known)


def measured_card(**known: object) -> FSPADModelCard:
    """A card with everything to draw."""
    measurements = [replace(GREEDY, acceptance_by_depth=[0.75, 0.5], num_plain_prompts=200, num_identical=198), OTHER]
    evaluations = [Evaluation(100, tau=1.5, speedup=1.1, accuracies=(0.5,)), Evaluation(200, tau=2.0)]
    training = replace(TRAINING, evaluations=evaluations)
    return FSPADModelCard(CONFIG, measurements=measurements, training=training, **known)


def test_plots_are_beside_the_card(tmp_path):
    measured_card().save(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"^!\[[^\]]+\]\((.*)\)$", text, re.MULTILINE):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "acceptance_by_depth.png", "training.png"]
    assert re.findall(r"\((\w+\.png)\)", text) == ["training.png", "acceptance_by_depth.png"]


def test_without_matplotlib_the_card_has_no_plots(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "fspad.hub_cards.plots", raising=False)
    measured_card().save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert ".png" not in text
    assert "| Held-out prompts | 0 (greedy) | 75.0% | 50.0% |" in text
    assert "| 200 | 2.00 |  |  |" in text


@pytest.mark.parametrize("plots", [(), ("training.png", "acceptance_by_depth.png")])
def test_a_measured_card_is_tidy_and_explains_its_figures(plots, tmp_path):
    card = measured_card().render(plots)
    assert not re.search(r"[ \t]+$|\n\n\n|None|nan", str(card), re.MULTILINE)
    assert "198 of 200" in card.text
    for explained in ("tau", "Speedup", "Accuracy", "Same as plain"):
        assert f"*{explained}* " in card.text
    assert "no benchmark" in card.text
    card.save(tmp_path / "README.md")
    again = ModelCard.load(tmp_path / "README.md")
    assert again.data.to_dict() == measured_card().data().to_dict()


def test_front_matter_passes_the_validation_of_huggingface_hub():
    card = measured_card(repo_id="user/head", license="mit", language=["en", "de"], tags=["small", "fspad"])
    metadata = card.data().to_dict()
    # Unlike loading, this raises for a model index that is not well formed.
    again = ModelCardData(**metadata, ignore_metadata_errors=False)
    assert again.eval_results == card.data().eval_results
    assert again.to_dict() == metadata
    assert metadata["language"] == ["en", "de"]
    assert metadata["tags"] == ["speculative-decoding", "draft-model", "fspad", "arxiv:2408.15562", "small"]
    assert FSPADModelCard(CONFIG, model_name="mine", measurements=[GREEDY]).data().model_name == "mine"
