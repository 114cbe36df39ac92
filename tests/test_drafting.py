import pytest
import torch
from conftest import make_target
from goldens import VARIANTS, load_golden

import fspad
from fspad.drafting import Drafter, DraftingKnobs
from fspad.target import embed_tokens
from fspad.tree import DraftedNodes

NO_PROMPT = torch.empty(1, 0, dtype=torch.long)


def draft_golden(golden, dtype, num_first_rows=None):
    """Draft the golden tree; the features come in one piece or, as while decoding, in two."""
    metadata, tensors = golden.metadata, golden.tensors
    golden.head.to(dtype), golden.target.to(dtype)
    knobs = DraftingKnobs(int(metadata["depth"]), int(metadata["top_k"]), int(metadata["total_tokens"]) - 1)
    drafter = Drafter(golden.head, golden.target, knobs, tensors["input_ids"])
    features, next_embeds = tensors["features"].to(dtype), embed_tokens(golden.target, tensors["input_ids"][:, 1:])
    positions = torch.arange(features.shape[1])[None]
    pieces = [slice(0, num_first_rows), slice(num_first_rows, None)] if num_first_rows else [slice(None)]
    with torch.no_grad():
        for rows in pieces:
            drafter.extend(features[:, rows], next_embeds[:, rows], positions[:, rows])
            tree = drafter.draft(tensors["input_ids"][:, -1:], max_depth=100)
    return drafter, tree


# The random EAGLE head's features explode from level to level, and rounding in fp32 decides its last nodes
@pytest.mark.parametrize(
    ("variant", "dtype"),
    [(variant, torch.float64) for variant in VARIANTS]
    + [(variant, torch.float32) for variant in VARIANTS if variant != "eagle"],
)
@pytest.mark.parametrize("num_first_rows", [None, 9])
def test_tree_is_that_of_the_original(variant, dtype, num_first_rows):
    golden = load_golden(variant)
    drafter, tree = draft_golden(golden, dtype, num_first_rows)
    assert tree.tokens[0].tolist() == golden.tensors["tree_tokens"].tolist()
    assert tree.depths[0].tolist() == golden.tensors["tree_depth"].tolist()
    assert torch.equal(tree.ancestors[0], golden.tensors["tree_mask"].bool())
    assert drafter.cache.get_seq_length() == golden.tensors["features"].shape[1], "drafted rows must leave the cache"


def make_drafter(batch=1, padding_mask=None, length=6, seed=0, knobs=None, **head_options):
    target = make_target(vocab_size=23)
    torch.manual_seed(seed)
    config = fspad.FSPADConfig.from_target(target.config, initializer_range=0.3, **head_options)
    head = fspad.FSPADModel.from_target(target, config)
    drafter = Drafter(head, target, knobs or DraftingKnobs(3, 4, 15), NO_PROMPT)
    features = torch.randn(batch, length, 32)
    positions = torch.arange(length).expand(batch, -1)
    if padding_mask is not None:
        positions = (padding_mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        drafter.extend(features, torch.randn(batch, length, 32), positions, padding_mask)
    return drafter


@torch.no_grad()
def test_scores_and_features_follow_the_path_of_each_node():
    """Every node of the tree must be what the head gives when it runs along that node's path alone."""
    drafter = make_drafter()
    root = torch.tensor([[5]])
    tree = drafter.draft(root, max_depth=100)
    for node in range(1, tree.num_nodes):
        path = tree.ancestors[0, node].nonzero()[1:, 0]
        chain = make_drafter()
        predict, feature = chain.last_predict, chain.last_regress
        for depth, ancestor in enumerate(path, start=1):
            token = tree.tokens[0, ancestor]
            best = chain.lm_head(predict)[0, -1].topk(4).indices
            assert token in best, "each node must be among the children that its own path suggests"
            embeds = embed_tokens(chain.target, token[None, None])
            output = chain.head(
                features=feature,
                inputs_embeds=embeds,
                position_ids=chain.last_position + depth,
                past_key_values=chain.cache,
                use_cache=True,
            )
            predict, feature = output.predict, output.regress


@torch.no_grad()
def test_rows_of_a_batch_draft_as_alone_and_padding_is_invisible():
    padding_mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    both = make_drafter(batch=2, padding_mask=padding_mask)
    trees = both.draft(torch.tensor([[5], [7]]), max_depth=100)

    torch.manual_seed(0)
    fspad.FSPADModel.from_target(both.target, both.head.config)  # the same random numbers as in make_drafter
    features, embeds = torch.randn(2, 6, 32), torch.randn(2, 6, 32)
    for row, start in ((0, 2), (1, 0)):
        alone = Drafter(both.head, both.target, both.knobs, NO_PROMPT)
        own = slice(row, row + 1)
        alone.extend(features[own, start:], embeds[own, start:], torch.arange(6 - start)[None])
        tree = alone.draft(torch.tensor([[5], [7]])[own], max_depth=100)
        assert torch.equal(tree.tokens[0], trees.tokens[row])
        assert torch.equal(tree.ancestors[0], trees.ancestors[row])


@torch.no_grad()
def test_depth_and_number_of_tokens_are_limits():
    drafter = make_drafter()
    root = torch.tensor([[5]])
    assert drafter.draft(root, max_depth=100).depths.max() == 4  # the first level and three more
    assert drafter.draft(root, max_depth=2).depths.max() == 2
    assert drafter.draft(root, max_depth=0).num_nodes == 1
    drafter.knobs = DraftingKnobs(3, 4, 2)
    assert drafter.draft(root, max_depth=100).num_nodes == 3
    drafter.knobs = DraftingKnobs(3, 50, 1000)  # more children than the vocabulary has tokens
    assert drafter.draft(root, max_depth=2).num_nodes == 1 + 23 + 23 * 23


@torch.no_grad()
def test_a_chain_is_a_tree_of_one_child_each():
    drafter = make_drafter(knobs=DraftingKnobs(3, 1, 15))
    tree = drafter.draft(torch.tensor([[5]]), max_depth=100)
    assert tree.parents[0].tolist() == [0, 0, 1, 2, 3]


@torch.no_grad()
def test_confidence_threshold_stops_early():
    root = torch.tensor([[5]])
    never, always = DraftingKnobs(3, 4, 15, 0.0), DraftingKnobs(3, 4, 15, 1.1)
    assert make_drafter(knobs=never).draft(root, max_depth=100).depths.max() == 4
    drafter = make_drafter(knobs=always)
    assert drafter.draft(root, max_depth=100).depths.max() == 1
    assert drafter.cache.get_seq_length() == 6


@torch.no_grad()
def test_levels_that_cannot_change_the_tree_are_not_drafted(monkeypatch):
    def draft(seed, num_draft_tokens):
        levels, next_level = [], Drafter._next_level
        with monkeypatch.context() as patch:
            patch.setattr(Drafter, "_next_level", lambda *args: levels.append(args) or next_level(*args))
            drafter = make_drafter(seed=seed, knobs=DraftingKnobs(5, 4, num_draft_tokens))
            tree = drafter.draft(torch.tensor([[5]]), max_depth=100)
        assert drafter.cache.get_seq_length() == 6
        return tree, len(levels)

    saved = []
    for seed in range(8):
        for num_draft_tokens in (6, 9, 30):
            tree, num_levels = draft(seed, num_draft_tokens)
            with monkeypatch.context() as patch:
                patch.setattr(DraftedNodes, "can_improve", lambda *_: True)
                whole_tree, all_levels = draft(seed, num_draft_tokens)
            assert all_levels == 5
            assert torch.equal(tree.tokens, whole_tree.tokens)
            assert torch.equal(tree.ancestors, whole_tree.ancestors)
            saved.append(all_levels - num_levels)
    assert sum(saved) > 0


@torch.no_grad()
def test_draft_vocabulary_restricts_drafts_and_can_be_lowered_at_run_time():
    drafter = make_drafter(draft_vocab_size=7)
    drafter.head.set_draft_vocabulary(torch.tensor([9, 3, 21, 0, 14, 6, 11]))
    for size, allowed in ((7, {9, 3, 21, 0, 14, 6, 11}), (3, {9, 3, 21})):
        drafter.head.config.draft_vocab_size = size
        trimmed = Drafter(drafter.head, drafter.target, drafter.knobs, NO_PROMPT)
        trimmed.extend(torch.randn(1, 4, 32), torch.randn(1, 4, 32), torch.arange(4)[None])
        assert set(trimmed.draft(torch.tensor([[5]]), max_depth=100).tokens[0, 1:].tolist()) <= allowed
    drafter.head.config.draft_vocab_size = 8
    with pytest.raises(ValueError, match="draft_vocab_size is 8, but the head holds 7"):
        Drafter(drafter.head, drafter.target, drafter.knobs, NO_PROMPT)


@torch.no_grad()
def test_tokens_of_the_prompt_are_drafted_whatever_the_draft_vocabulary():
    drafter = make_drafter(draft_vocab_size=3)
    drafter.head.set_draft_vocabulary(torch.tensor([9, 3, 21]))
    prompt = torch.tensor([[5, 3, 17], [17, 5, 0]])
    with_prompt = Drafter(drafter.head, drafter.target, DraftingKnobs(0, 50, 50), prompt)
    with_prompt.extend(torch.randn(1, 4, 32), torch.randn(1, 4, 32), torch.arange(4)[None])
    tree = with_prompt.draft(torch.tensor([[5]]), max_depth=100)
    assert sorted(tree.tokens[0, 1:].tolist()) == [0, 3, 5, 9, 17, 21]
    drafter.head.set_draft_vocabulary(None)
    assert Drafter(drafter.head, drafter.target, drafter.knobs, prompt).lm_head.token_ids is None
