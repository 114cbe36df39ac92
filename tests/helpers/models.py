"""Tiny random targets and heads that every test can build in milliseconds."""

import json
import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import fspad
from fspad.draft_source import DraftSource

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
    config = fspad.FSPADConfig.from_target(
        target.config,
        **{"initializer_range": 0.2, "draft_top_k": 10, "num_draft_tokens": 59, "lookup": False, **overrides},
    )
    return fspad.FSPADModel.from_target(target, config)


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% generation %}{{ m['content'] }}{% endgeneration %} ; {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of 97 words for `make_target`, with a chat template."""
    words = ["<unk>", "<eos>", "user", "assistant", ":", ";"]
    vocab = {word: i for i, word in enumerate([*words, *(f"w{i}" for i in range(97 - len(words)))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


class FutureSource(DraftSource):
    """Proposes the true continuation to a random depth, among distractors: random heads rarely get that far.

    Args:
        sequence: Prompt and true continuation, of shape `(1, length)`.
        seed: Seed of the depths and of the distractors.
        chain: Whether every node gets one child only.
    """

    def __init__(self, sequence: torch.Tensor, seed: int, chain: bool = False):
        self.tokens = sequence[0].tolist()
        self.rng = random.Random(seed)
        self.chain = chain
        self.length = 0

    def extend(self, emitted):
        self.length += len(emitted.token_ids[0])

    def propose(self, candidates, size, max_depth):
        future = self.tokens[self.length :][: min(self.rng.randint(0, 9), max_depth)]
        last, true_parent = [0], 0
        for level, token in enumerate(future, start=1):
            distractors = 0 if self.chain else self.rng.randint(0, 3)
            proposed = [(self.rng.choice(last), self.rng.randint(0, max(self.tokens))) for _ in range(distractors)]
            proposed.insert(self.rng.randint(0, distractors), (true_parent, token))
            last = [candidates[0].add(parent, other, -float(level)) for parent, other in proposed]
            true_parent = candidates[0].find(true_parent, token)


def know_the_future(head, sequence: torch.Tensor, seed: int) -> None:
    """Let a head draft the true continuation among distractors.

    Args:
        head: The head.
        sequence: Prompt and true continuation, of shape `(1, length)`.
        seed: Seed of the distractors.
    """
    head.config.num_draft_tokens = 64

    def draft_sources(target, prompt_ids, top_k, noise):
        return [FutureSource(sequence, seed, chain=top_k == 1)]

    head.draft_sources = draft_sources


def edit_json(file: Path, **fields) -> None:
    """Change fields of a JSON file.

    Args:
        file: The file.
        **fields: New values.
    """
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
