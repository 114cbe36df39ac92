"""The mask of a tree by hand, and what is cut from the attentions of a tree."""

import pytest
import torch
from transformers import DynamicCache

from fspad.tree import DraftTree
from fspad.tree_attention import (
    additive_mask,
    attention_windows,
    attentions_of_path,
    hidden_states_of_path,
    tree_attention_mask,
)
from helpers.models import make_target

# 0 -> {1, 2}, 2 -> {3}
TREE = DraftTree([[5, 6, 7, 8]], [[0, 0, 0, 2]])
ANCESTORS = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]


def filled_cache(target, length):
    cache = DynamicCache(config=target.config)
    with torch.no_grad():
        target(torch.ones(1, length, dtype=torch.long), past_key_values=cache)
    cache.activate_past_recording()
    return cache


def allowed(mask):
    assert mask.dtype == torch.float32
    assert set(mask.unique().tolist()) <= {0.0, torch.finfo(torch.float32).min}
    return (mask[0, 0] == 0).int().tolist()


def test_nodes_see_the_past_and_their_ancestors():
    target = make_target()
    cache = filled_cache(target, 3)
    mask = tree_attention_mask(TREE, cache, target, None)
    assert allowed(mask) == [[1, 1, 1, *ancestors] for ancestors in ANCESTORS]
    padding = torch.tensor([[0, 1, 1, 1]])
    mask = tree_attention_mask(TREE, cache, target, padding)
    assert allowed(mask) == [[0, 1, 1, *ancestors] for ancestors in ANCESTORS]


def test_windows_count_the_depth_of_a_node_and_not_its_place():
    target = make_target("gemma3", sliding_window=3)
    cache = filled_cache(target, 6)
    masks = tree_attention_mask(TREE, cache, target, None)
    assert set(masks) == {"full_attention", "sliding_attention"}
    assert allowed(masks["full_attention"]) == [[1] * 6 + ancestors for ancestors in ANCESTORS]
    sliding = allowed(masks["sliding_attention"])
    kept = len(sliding[0]) - 4
    # The root stands at 6 and sees 4, 5, 6; its children at 7 see 5, 6, 7; the last one at 8 sees 6, 7, 8
    past = [[4, 5], [5], [5], []]
    for node, positions in enumerate(past):
        assert sliding[node] == [int(6 - kept + i in positions) for i in range(kept)] + ANCESTORS[node]


def test_windows_end_inside_of_a_deep_tree():
    target = make_target("gemma3", sliding_window=2)
    chain = DraftTree([[1, 2, 3, 4]], [[0, 0, 1, 2]])
    masks = tree_attention_mask(chain, filled_cache(target, 4), target, None)
    assert [row[-4:] for row in allowed(masks["sliding_attention"])] == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_additive_mask(dtype):
    mask = additive_mask(torch.tensor([[[True, False]]]), dtype)
    assert mask.shape == (1, 1, 1, 2)
    assert mask.dtype == dtype
    assert mask.flatten().tolist() == [0.0, torch.finfo(dtype).min]


def test_states_of_the_accepted_path():
    layers = (torch.arange(8.0).reshape(1, 4, 2), None)
    states = hidden_states_of_path(layers, [0, 2, 3])
    assert [step[0].tolist() for step in states] == [[[[0.0, 1.0]]], [[[4.0, 5.0]]], [[[6.0, 7.0]]]]
    assert all(step[1] is None for step in states)


def test_attentions_of_the_accepted_path():
    # Two cached positions, then the tree; the attention to a key is its index
    layer = torch.arange(6.0).expand(1, 1, 4, 6)
    steps = attentions_of_path((layer, layer, None), [0, 2, 3], 4, [None, 3, None])
    assert [step[0].flatten().tolist() for step in steps] == [[0, 1, 2], [0, 1, 2, 4], [0, 1, 2, 4, 5]]
    assert [step[1].flatten().tolist() for step in steps] == [[0, 1, 2], [1, 2, 4], [2, 4, 5]]
    assert all(step[2] is None for step in steps)


def test_windows_of_layers():
    target = make_target("gemma3", sliding_window=7)
    cache = DynamicCache(config=target.config)
    assert attention_windows(target.config, cache, 3) == [7, None, 7]
    target = make_target()
    assert attention_windows(target.config, DynamicCache(config=target.config), 3) == [None] * 3
