"""Drafters of random heads, what a target would show them, and what steps cost."""

import torch

import fspad
from fspad.draft_size import FixedSize
from fspad.draft_source import Emitted
from fspad.drafting import Drafter
from fspad.head_source import HeadSource
from fspad.step_costs import StepCosts
from helpers.models import make_target

CPU = torch.device("cpu")
NO_PROMPT = torch.empty(1, 0, dtype=torch.long)


def emitted(features, next_embeds, roots, positions=None, padding_mask=None):
    """What a target has emitted, of which only the last token of each row is named.

    Args:
        features: Of shape `(batch, length, hidden)`.
        next_embeds: Of the same shape.
        roots: The last token of each row.
        positions: Of shape `(batch, length)`; by default from 0.
        padding_mask: Of the same shape.
    """
    if positions is None:
        positions = torch.arange(features.shape[1]).expand(features.shape[0], -1)
    return Emitted([[root] for root in roots], features, next_embeds, positions, padding_mask)


def make_drafter(batch=1, padding_mask=None, length=6, seed=0, size=None, top_k=4, **head_options):
    """A drafter with a random head that has seen random features, and the source that drafts with the head.

    Args:
        batch: Rows.
        padding_mask: Of shape `(batch, length)`.
        length: Positions that the head has seen.
        seed: Seed of head and features.
        size: Size of the drafts; by default three levels after the first, and 15 nodes.
        top_k: Nodes to expand, and children of each.
        **head_options: Configuration fields.
    """
    target = make_target(vocab_size=23)
    torch.manual_seed(seed)
    config = fspad.FSPADConfig.from_target(target.config, initializer_range=0.3, **head_options)
    source = HeadSource(fspad.FSPADModel.from_target(target, config), target, top_k, NO_PROMPT)
    drafter = Drafter([source], size or FixedSize(15, 3))
    features = torch.randn(batch, length, 32)
    positions = None if padding_mask is None else (padding_mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        drafter.extend(emitted(features, torch.randn(batch, length, 32), [5, 7][:batch], positions, padding_mask))
    return drafter, source


def tried(seconds):
    """Costs whose trials took what a function says.

    Args:
        seconds: Seconds of a verification by number of nodes.
    """
    costs = StepCosts()
    while (size := costs.trial) is not None:
        costs.observe_verify(size, seconds(size))
    return costs
