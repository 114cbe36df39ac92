"""The code in a card: what it pins, and that it works."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fspad.hub_cards import FSPADModelCard
from helpers import fresh
from helpers.cards import (
    CARDS,
    CONFIG,
    SHA,
    TARGET,
    TARGET_SHA,
    bare_card,
    calls,
    full_card,
    hub_card,
    python_block,
    python_blocks,
)
from helpers.models import make_head, make_target

# Stands for the file that a pushed head has, and takes what the card's call hands on.
RECIPE = f"""
from transformers import AutoModel


def generate(model, revision, **kwargs):
    assert revision == {SHA!r}
    kwargs["assistant_model"] = AutoModel.from_pretrained("user/head", trust_remote_code=True, dtype=model.dtype)
    return model.generate(**kwargs)
"""


def test_snippet_pins_both_revisions():
    arguments = calls(python_block(hub_card()))
    assert arguments["AutoModel.from_pretrained"] == {"revision": SHA, "trust_remote_code": True}
    for name in ("AutoModelForCausalLM.from_pretrained", "AutoTokenizer.from_pretrained"):
        assert arguments[name] == {"revision": TARGET_SHA}
    (custom_generate,) = [block for block in python_blocks(hub_card()) if "custom_generate" in block]
    assert calls(custom_generate)["target.generate"] == {
        "custom_generate": "user/head",
        "revision": SHA,
        "trust_remote_code": True,
        "max_new_tokens": 128,
    }
    assert "import fspad" not in python_block(hub_card())
    assert "`revision` pins the code and the weights that this card describes." in str(hub_card().render())


def test_snippet_without_a_known_revision():
    card = FSPADModelCard(CONFIG, repo_id="user/head", target=TARGET)
    assert calls(python_block(card))["AutoModel.from_pretrained"] == {"trust_remote_code": True}
    assert "Pin what you have read with `revision=`." in str(card.render())


def test_snippet_of_a_head_without_a_repository():
    block = python_block(full_card())
    assert block.startswith("import fspad")
    assert 'AutoModel.from_pretrained("examples/heads/small", dtype=target.dtype)' in block
    assert "trust_remote_code" not in block
    assert 'AutoModel.from_pretrained("path/to/this/folder"' in python_block(bare_card())


@pytest.mark.parametrize("on_hub", [True, False])
def test_snippet_runs_in_a_fresh_process(on_hub, tmp_path):
    target = make_target()
    target.save_pretrained(tmp_path / TARGET)
    vocab = {"<unk>": 0, **{f"w{i}": i for i in range(1, 97)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", model_input_names=names).save_pretrained(
        tmp_path / TARGET
    )
    head = make_head(target)
    head.save_pretrained(tmp_path / "user" / "head")
    # What a repository has there loads the head by itself.
    recipe = tmp_path / "user" / "head" / "custom_generate" / "generate.py"
    recipe.parent.mkdir(exist_ok=True)
    recipe.write_text(RECIPE)
    where = {"repo_id": "user/head", "revision": SHA} if on_hub else {"path": "user/head"}
    script = python_block(FSPADModelCard(head.config, target=TARGET, **where))
    if on_hub:
        script = "import sys; sys.modules['fspad'] = None  # as if it were not installed\n" + script
    # Both ids are also folders here, which come before the Hub.
    assert "max_new_tokens=128" in script
    texts = fresh.run(script.replace("max_new_tokens=128", "max_new_tokens=40"), tmp_path).strip().splitlines()
    assert len(texts) == (3 if on_hub else 2)
    assert all(len(text.split()) > 30 for text in texts)
    # Greedy; a pipeline samples.
    assert len(set(texts[:-1])) == 1


@CARDS
def test_snippet_compiles(make):
    compile(python_block(make()), "card", "exec")
