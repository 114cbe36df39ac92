"""What the head proposes: the tree of the original implementation, and its limits."""

import pytest
import torch

import fspad
from fspad.draft_size import FixedSize
from fspad.drafting import Drafter
from fspad.head_source import HeadSource
from fspad.target import embed_tokens
from helpers.drafters import CPU, NO_PROMPT, emitted, make_drafter
from helpers.goldens import VARIANTS, load_golden
from helpers.models import make_head, make_target

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


# The random EAGLE head's features explode from level to level, and rounding in fp32 decides its last nodes
@pytest.mark.parametrize(
    ("variant", "dtype"),
    [(variant, torch.float64) for variant in VARIANTS]
    + [(variant, torch.float32) for variant in VARIANTS if variant != "eagle"],
)
@pytest.mark.parametrize("num_first_rows", [None, 9])
def test_tree_is_that_of_the_original(variant, dtype, num_first_rows):
    """The features come in one piece or, as while decoding, in two."""
    golden = load_golden(variant)
    metadata, tensors = golden.metadata, golden.tensors
    golden.head.to(dtype), golden.target.to(dtype)
    source = HeadSource(golden.head, golden.target, int(metadata["top_k"]), tensors["input_ids"])
    drafter = Drafter([source], FixedSize(int(metadata["total_tokens"]) - 1, int(metadata["depth"])))
    features, next_embeds = tensors["features"].to(dtype), embed_tokens(golden.target, tensors["input_ids"][:, 1:])
    positions = torch.arange(features.shape[1])[None]
    pieces = [slice(0, num_first_rows), slice(num_first_rows, None)] if num_first_rows else [slice(None)]
    for rows in pieces:
        roots = [int(tensors["input_ids"][0, 1:][rows][-1])]
        drafter.extend(emitted(features[:, rows], next_embeds[:, rows], roots, positions[:, rows]))
        tree = drafter.draft(100, CPU)
    assert tree.tokens[0].tolist() == tensors["tree_tokens"].tolist()
    assert tree.depths[0].tolist() == tensors["tree_depth"].tolist()
    assert torch.equal(tree.ancestors[0], tensors["tree_mask"].bool())
    assert source.cache.get_seq_length() == features.shape[1], "drafted rows must leave the cache"


def test_scores_and_features_follow_the_path_of_each_node():
    """Every node of the tree must be what the head gives when it runs along that node's path alone."""
    drafter, _ = make_drafter()
    tree = drafter.draft(100, CPU)
    for node in range(1, tree.num_nodes):
        path = tree.ancestors[0, node].nonzero()[1:, 0]
        _, chain = make_drafter()
        chain._catch_up()
        predict, feature = chain.last_predict, chain.last_regress
        for depth, ancestor in enumerate(path, start=1):
            token = tree.tokens[0, ancestor]
            best = chain.lm_head(predict)[0, -1].topk(4).indices
            assert token in best, "each node must be among the children that its own path suggests"
            output = chain.head(
                features=feature,
                inputs_embeds=embed_tokens(chain.target, token[None, None]),
                position_ids=chain.last_position + depth,
                past_key_values=chain.cache,
                use_cache=True,
            )
            predict, feature = output.predict, output.regress


def test_rows_of_a_batch_draft_as_alone_and_padding_is_invisible():
    padding_mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    both, source = make_drafter(batch=2, padding_mask=padding_mask)
    trees = both.draft(100, CPU)

    torch.manual_seed(0)
    fspad.FSPADModel.from_target(source.target, source.head.config)  # the same random numbers as in make_drafter
    features, embeds = torch.randn(2, 6, 32), torch.randn(2, 6, 32)
    for row, start in ((0, 2), (1, 0)):
        alone = Drafter([HeadSource(source.head, source.target, 4, NO_PROMPT)], both.size)
        own = slice(row, row + 1)
        alone.extend(emitted(features[own, start:], embeds[own, start:], [5, 7][own]))
        tree = alone.draft(100, CPU)
        assert torch.equal(tree.tokens[0], trees.tokens[row])
        assert torch.equal(tree.ancestors[0], trees.ancestors[row])


def test_padding_that_comes_later_is_invisible_too():
    """A cache that was filled without padding goes on as it is."""
    _, source = make_drafter(length=4)
    drafter = Drafter([source], FixedSize(15, 3))
    more = torch.randn(2, 1, 3, 32)
    positions = torch.tensor([[4, 4, 5]])
    drafter.extend(emitted(more[0], more[1], [5], positions, torch.tensor([[0, 1, 1]])))
    padded = drafter.draft(100, CPU)
    _, source = make_drafter(length=4)
    drafter = Drafter([source], FixedSize(15, 3))
    drafter.extend(emitted(more[0][:, 1:], more[1][:, 1:], [5], positions[:, 1:]))
    plain = drafter.draft(100, CPU)
    assert padded.token_lists == plain.token_lists
    assert padded.parent_lists == plain.parent_lists


def test_what_was_emitted_in_pieces_is_taken_in_at_once():
    """A head that sat out some steps knows what was emitted in them."""
    features, embeds = torch.randn(1, 7, 32), torch.randn(1, 7, 32)
    trees = []
    for pieces in ([slice(0, 7)], [slice(0, 4), slice(4, 5), slice(5, 7)]):
        drafter, source = make_drafter()
        for rows in pieces:
            drafter.extend(emitted(features[:, rows], embeds[:, rows], [5], torch.arange(6, 13)[None, rows]))
        trees.append(drafter.draft(100, CPU))
        assert source.cache.get_seq_length() == 13
    assert trees[0].token_lists == trees[1].token_lists
    assert trees[0].parent_lists == trees[1].parent_lists


def test_depth_and_number_of_tokens_are_limits():
    drafter, source = make_drafter()
    assert drafter.draft(100, CPU).depths.max() == 4  # the first level and three more
    assert drafter.draft(2, CPU).depths.max() == 2
    assert drafter.draft(0, CPU).num_nodes == 1
    drafter.size = FixedSize(2, 3)
    assert drafter.draft(100, CPU).num_nodes == 3
    source.top_k, drafter.size = 50, FixedSize(1000, 3)  # more children than the vocabulary has tokens
    assert drafter.draft(2, CPU).num_nodes == 1 + 23 + 23 * 23


def test_a_chain_is_a_tree_of_one_child_each():
    drafter, _ = make_drafter(top_k=1)
    assert drafter.draft(100, CPU).parent_lists == [[0, 0, 1, 2, 3]]


@pytest.mark.parametrize("looks_between_levels", [False, True])
def test_confidence_threshold_stops_early(looks_between_levels):
    for threshold, depth in ((0.0, 4), (1.1, 1)):
        drafter, source = make_drafter(size=FixedSize(15, 3, threshold))
        source.looks_between_levels = looks_between_levels
        assert drafter.draft(100, CPU).depths.max() == depth
        assert source.cache.get_seq_length() == 6


def test_levels_that_cannot_change_the_tree_are_not_drafted(monkeypatch):
    def draft(seed, num_draft_tokens, looks):
        levels, next_level = [], HeadSource._next_level
        with monkeypatch.context() as patch:
            patch.setattr(HeadSource, "_next_level", lambda *args: levels.append(args) or next_level(*args))
            drafter, source = make_drafter(seed=seed, size=FixedSize(num_draft_tokens, 5))
            source.looks_between_levels = looks
            tree = drafter.draft(100, CPU)
        assert source.cache.get_seq_length() == 6
        return tree, len(levels)

    saved = []
    for seed in range(8):
        for num_draft_tokens in (6, 9, 30):
            tree, num_levels = draft(seed, num_draft_tokens, looks=True)
            whole_tree, all_levels = draft(seed, num_draft_tokens, looks=False)
            assert all_levels == 5
            assert tree.token_lists == whole_tree.token_lists
            assert tree.parent_lists == whole_tree.parent_lists
            saved.append(all_levels - num_levels)
    assert sum(saved) > 0


def test_a_head_that_writes_nan_drafts_a_tree_all_the_same():
    for looks_between_levels in (False, True):
        drafter, source = make_drafter()
        source.looks_between_levels = looks_between_levels
        with torch.no_grad():
            source.head.layer.mlp.down_proj.weight[3, 4] = torch.nan
        tree = drafter.draft(100, CPU)
        assert tree.num_nodes > 1
        assert all(parent < node for node, parent in enumerate(tree.parent_lists[0][1:], start=1))


def test_draft_vocabulary_restricts_drafts_and_can_be_lowered_at_run_time():
    drafter, source = make_drafter(draft_vocab_size=7)
    head, target = source.head, source.target
    head.set_draft_vocabulary(torch.tensor([9, 3, 21, 0, 14, 6, 11]))
    for size, allowed in ((7, {9, 3, 21, 0, 14, 6, 11}), (3, {9, 3, 21})):
        head.config.draft_vocab_size = size
        trimmed = Drafter([HeadSource(head, target, 4, NO_PROMPT)], drafter.size)
        trimmed.extend(emitted(torch.randn(1, 4, 32), torch.randn(1, 4, 32), [5]))
        assert set(trimmed.draft(100, CPU).token_lists[0][1:]) <= allowed
    head.config.draft_vocab_size = 8
    with pytest.raises(ValueError, match="draft_vocab_size is 8, but the head holds 7"):
        HeadSource(head, target, 4, NO_PROMPT)


def test_tokens_of_the_prompt_are_drafted_whatever_the_draft_vocabulary():
    _, source = make_drafter(draft_vocab_size=3)
    head, target = source.head, source.target
    head.set_draft_vocabulary(torch.tensor([9, 3, 21]))
    prompt = torch.tensor([[5, 3, 17], [17, 5, 0]])
    drafter = Drafter([HeadSource(head, target, 50, prompt)], FixedSize(50, 0))
    drafter.extend(emitted(torch.randn(1, 4, 32), torch.randn(1, 4, 32), [5]))
    assert sorted(drafter.draft(100, CPU).token_lists[0][1:]) == [0, 3, 5, 9, 17, 21]
    head.set_draft_vocabulary(None)
    assert HeadSource(head, target, 4, prompt).lm_head.token_ids is None


def test_drafting_draws_no_random_numbers():
    """Sampling draws from the same numbers, with a head that a trainer has left in training mode as well."""
    target = make_target(vocab_size=9)
    head = make_head(target, attention_dropout=0.5).train()
    options = {"do_sample": True, "max_new_tokens": 30}
    prompt = torch.tensor([[1, 2, 3]])
    outputs, states = [], []
    for assistant in (None, head):
        torch.manual_seed(3)
        outputs.append(target.generate(prompt, assistant_model=assistant, return_dict_in_generate=True, **options))
        states.append(torch.get_rng_state())
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert torch.equal(*states)
    assert all(module.training for module in head.modules())

    # What drafts in training mode is what drafts in evaluation mode
    torch.manual_seed(3)
    evaluated = target.generate(prompt, assistant_model=head.eval(), return_dict_in_generate=True, **options)
    assert torch.equal(evaluated.accept_lengths, outputs[1].accept_lengths)
