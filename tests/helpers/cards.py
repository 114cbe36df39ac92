"""Cards of which nothing, something and everything is known, and the code in them."""

import ast
import re
from dataclasses import replace

import pytest

import fspad
from fspad.hub_cards import FSPADModelCard, Measurement, Training

CONFIG = fspad.FSPADConfig(vocab_size=97, hidden_size=32, num_attention_heads=4)
TARGET = "somebody/target"
SHA, TARGET_SHA = "0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"
WHERE = {"machine": "A|B CPU, a name that is long enough for YAML to fold it into two lines", "dtype": "bfloat16"}
GREEDY = Measurement("Held-out prompts", 0, 2.346, 1.5, tokens_per_second=43.21, num_prompts=200, threads=2, **WHERE)
SAMPLED = replace(GREEDY, temperature=1.0, tau=2.0, speedup=1.25)
OTHER = Measurement("Spec-Bench: math", 0, tau=3)
TRAINING = Training(
    dataset="Prompts answered\nby the target",
    num_dialogs=4000,
    num_answer_tokens=1234567,
    steps=2000,
    epochs=8.0,
    mask_policy="answers only",
    recipe={"learning_rate": 5e-4, "max_grad_value": None},
    hardware="2 CPU cores",
    versions={"torch": "2.13.0"},
)


def bare_card() -> FSPADModelCard:
    """A card of which only the config is known."""
    return FSPADModelCard(CONFIG)


def hub_card() -> FSPADModelCard:
    """The card of a head on the Hub, at a revision."""
    return FSPADModelCard(CONFIG, repo_id="user/head", revision=SHA, target=TARGET, target_revision=TARGET_SHA)


def full_card() -> FSPADModelCard:
    """A card of a head in a folder of which everything is known."""
    return FSPADModelCard(
        fspad.FSPADConfig(**{**CONFIG.to_dict(), "draft_vocab_size": 50, "target_model_name": TARGET}),
        path="examples/heads/small",
        target_weights="GGUF Q4_1, dequantised",
        training=TRAINING,
        measurements=[GREEDY, OTHER, SAMPLED],
        license="apache-2.0",
        license_note="Inherited from the target.\n",
        datasets=["openai/gsm8k"],
    )


CARDS = pytest.mark.parametrize("make", [bare_card, hub_card, full_card])


def python_blocks(card: FSPADModelCard) -> list[str]:
    """The blocks of Python in a card."""
    return re.findall(r"```python\n(.*?)```", str(card.render()), re.DOTALL)


def python_block(card: FSPADModelCard) -> str:
    """All Python in a card."""
    return "\n".join(python_blocks(card))


def calls(block: str) -> dict[str, dict[str, object]]:
    """Keyword arguments that are literals, by the function called."""
    found = [
        node for node in ast.walk(compile(block, "card", "exec", ast.PyCF_ONLY_AST)) if isinstance(node, ast.Call)
    ]
    return {
        ast.unparse(call.func): {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
        for call in found
    }
