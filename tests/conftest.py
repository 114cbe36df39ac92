"""Tiny random targets and heads that every test can build in milliseconds."""

import random

import huggingface_hub
import pytest
import torch
import transformers
from hub_server import TOKEN, HubServer

import fspad
from fspad.drafting import Drafter
from fspad.tree import DraftedNodes


@pytest.fixture(autouse=True)
def _seed_and_threads():
    torch.manual_seed(0)
    torch.set_num_threads(2)


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """A stand-in of the Hub that this process uses too."""
    with HubServer() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setattr("fspad.hub_cards.push.WAITS", (0, 0, 0))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("tmp")))  # where failed pushes stay
        yield server


SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}

FAMILIES = {
    "llama": lambda **kw: transformers.LlamaConfig(**{**SIZES, **kw}),
    "qwen3": lambda **kw: transformers.Qwen3Config(**{**SIZES, "head_dim": 8, **kw}),
    "gemma3": lambda **kw: transformers.Gemma3TextConfig(
        **{
            **SIZES,
            "head_dim": 8,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            **kw,
        }
    ),
    "gpt2": lambda **kw: transformers.GPT2Config(
        **{"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512, **kw}
    ),
    "mixtral": lambda **kw: transformers.MixtralConfig(
        **{**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, **kw}
    ),
}


def make_target(family: str = "llama", seed: int = 0, sharpness: float = 6.0, **overrides):
    """A tiny random causal LM without special tokens; its logits are scaled so that greedy paths do not all collapse.

    Args:
        family: One of `FAMILIES`.
        seed: Seed of the weights.
        sharpness: Factor on the LM head's initial weights.
        **overrides: Configuration fields.
    """
    torch.manual_seed(seed)
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = FAMILIES[family](**{**special, "initializer_range": 0.2, "tie_word_embeddings": False, **overrides})
    target = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        target.get_output_embeddings().weight.mul_(sharpness / config.hidden_size**0.5)
    target.generation_config.pad_token_id = 0
    return target


def make_head(target, seed: int = 0, **overrides):
    """A random head for a target, with weights large enough to have opinions; of up to 10 tokens it drafts all first.

    Args:
        target: The target.
        seed: Seed of the weights.
        **overrides: Configuration fields.
    """
    torch.manual_seed(seed)
    config = fspad.FSPADConfig.from_target(target.config, **{"initializer_range": 0.2, "draft_top_k": 10, **overrides})
    return fspad.FSPADModel.from_target(target, config)


def know_the_future(monkeypatch, sequence: torch.Tensor, seed: int) -> None:
    """Let drafts hold the true continuation to a random depth, among distractors: random heads rarely get that far."""
    rng = random.Random(seed)
    largest = int(sequence.max())

    def draft(drafter, root_tokens, max_depth):
        future = sequence[0, int(drafter.last_position) + 2 :].tolist()
        nodes, last, true_parent = DraftedNodes(), [-1], -1
        for token in future[: min(rng.randint(0, 9), max_depth)]:
            tokens = [rng.randint(0, largest) for _ in range(rng.randint(0, 3))]
            parents = [rng.choice(last) for _ in tokens]
            place = rng.randint(0, len(tokens))
            tokens.insert(place, token)
            parents.insert(place, true_parent)
            scores = torch.full((1, len(tokens)), -float(len(nodes.tokens)))
            first = nodes.add_level(torch.tensor([tokens]), torch.tensor([parents]), scores)
            last, true_parent = list(range(first, first + len(tokens))), first + place
        return nodes.best_tree(root_tokens, num_draft_tokens=len(nodes))

    monkeypatch.setattr(Drafter, "draft", draft)
