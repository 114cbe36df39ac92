"""Targets and heads for servers, and the chains that a head drafts."""

from pathlib import Path

import torch

from fspad import FSPADModel
from fspad.cli.export import export_head
from fspad.target import FeatureTap, LMHead, embed_tokens
from helpers.models import make_head, make_target

# vLLM's attention on processors has heads of 32 and more
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def make_pair(strength: float = 0.004, family: str = "llama", **variant):
    """A tiny target and a head that both look at the last token first.

    Args:
        strength: Of everything else. By default the head drafts often, not always, what the target writes; with 0.1 it
            hardly does, and a draft depends on every part of the head.
        family: Of the target.
        **variant: Fields of the head's configuration.
    """
    target = make_target(family, **SIZES, dtype="float32")
    head = make_head(target, **variant)
    hidden_size = target.config.hidden_size
    with torch.no_grad():
        for name, weight in [*target.named_parameters(), *head.named_parameters()]:
            if "o_proj" in name or "down_proj" in name or name.endswith("fc.bias"):
                weight.mul_(strength)
        fusion = head.feature_sampling.fc.weight
        fusion.mul_(strength)
        fusion[:, :hidden_size] += torch.eye(hidden_size)
    return target, head


def save_pair(folder: Path, **options) -> tuple[str, str]:
    """Save such a target, and export such a head.

    Args:
        folder: Folder for both.
        **options: As of [`make_pair`].

    Returns:
        Their folders.
    """
    target, head = make_pair(**options)
    target.save_pretrained(folder / "target")
    head.save_pretrained(folder / "head")
    export_head(folder / "head", folder / "exported")
    return str(folder / "target"), str(folder / "exported")


@torch.no_grad()
def draft_chain(head: FSPADModel, target, context: list[int], length: int) -> list[int]:
    """The most probable chain that a head drafts after some tokens, each step on its own feature.

    Args:
        head: The head.
        target: Its target.
        context: Token ids so far.
        length: Tokens to draft.
    """
    lm_head = LMHead(target, head.active_draft_vocab_ids)
    ids = torch.tensor([context])
    with FeatureTap(target) as tap, tap.record() as recorded:
        target(ids[:, :-1], use_cache=False)
    features, tokens, cache, chain = recorded[0], ids[:, 1:], None, []
    for _ in range(length):
        output = head(features, embed_tokens(target, tokens), past_key_values=cache, use_cache=True)
        best = int(lm_head(output.predict[:, -1]).argmax())
        chain.append(best if head.active_draft_vocab_ids is None else int(head.active_draft_vocab_ids[best]))
        features, tokens, cache = output.regress[:, -1:], torch.tensor([chain[-1:]]), output.past_key_values
    return chain


def replay(head: FSPADModel, target, prompt: list[int], answer: list[int], length: int) -> list[list[int]]:
    """The chains that are drafted on the way to an answer, one a step.

    Args:
        head: The head.
        target: Its target.
        prompt: Token ids of the prompt.
        answer: Token ids of the target's greedy answer.
        length: Tokens of a chain.
    """
    chains, known = [], 1
    while known < len(answer):
        chain = draft_chain(head, target, prompt + answer[:known], length)
        chains.append(chain)
        accepted = 0
        while accepted < length and known + accepted < len(answer) and chain[accepted] == answer[known + accepted]:
            accepted += 1
        known += accepted + 1
    return chains
