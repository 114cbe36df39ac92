import torch

from fspad.tree import DraftedNodes, DraftTree


def two_levels(scores_1, scores_2, parents_2):
    nodes = DraftedNodes()
    nodes.add_level(torch.tensor([[10, 11]]), torch.tensor([[-1, -1]]), torch.tensor([scores_1]))
    tokens = torch.arange(20, 20 + len(scores_2))[None]
    nodes.add_level(tokens, torch.tensor([parents_2]), torch.tensor([scores_2]))
    return nodes


def test_best_nodes_by_hand():
    nodes = two_levels([-0.1, -2.0], [-0.5, -3.0, -2.5, -4.0], [0, 0, 1, 1])
    tree = nodes.best_tree(torch.tensor([[7]]), num_draft_tokens=4)
    # By score: 10 (-0.1), 20 (-0.5), 11 (-2.0), 22 (-2.5); in the order of the levels: 10, 11, 20, 22
    assert tree.tokens.tolist() == [[7, 10, 11, 20, 22]]
    assert tree.parents.tolist() == [[0, 0, 0, 1, 2]]
    assert tree.depths.tolist() == [[0, 1, 1, 2, 2]]
    assert tree.ancestors[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 0, 1, 0, 1],
    ]


def test_a_child_that_ties_with_its_parent_never_replaces_it():
    # 20 is certain after 11, so it scores what 11 scores; only one of the two fits
    tree = two_levels([-0.1, -0.2], [-0.2, -5.0, -5.0, -5.0], [1, 0, 0, 1]).best_tree(torch.tensor([[7]]), 2)
    assert tree.tokens.tolist() == [[7, 10, 11]]


def test_only_nodes_above_the_worst_kept_can_have_descendants_in_the_tree():
    nodes = two_levels([-0.1, -2.0], [-0.5, -3.0, -2.5, -4.0], [0, 0, 1, 1])
    assert nodes.can_improve(torch.tensor([[-0.5, -2.5]]), num_draft_tokens=3)
    assert not nodes.can_improve(torch.tensor([[-2.0]]), num_draft_tokens=3)  # a tie, which the earlier node wins
    assert nodes.can_improve(torch.tensor([[-2.0]]), num_draft_tokens=4)
    assert nodes.can_improve(torch.tensor([[-9.0]]), num_draft_tokens=7)  # there is room


def is_closed(tree: DraftTree) -> bool:
    """Whether every parent stands before its child, one level above it."""
    nodes = torch.arange(tree.num_nodes)
    depths = tree.depths
    parent_depths = depths.gather(1, tree.parents)
    return bool((tree.parents[:, 1:] < nodes[1:]).all() and (parent_depths[:, 1:] == depths[:, 1:] - 1).all())


def test_ancestors_are_closed_under_many_ties_and_bad_scores():
    generator = torch.Generator().manual_seed(0)
    for case in range(200):
        batch, top_k = 3, 4
        nodes = DraftedNodes()
        scores = -torch.randint(0, 3, (batch, top_k), generator=generator).float()
        if case % 10 == 0:
            scores[0, 1] = torch.nan
        if case % 10 == 1:
            scores[:] = -torch.inf
        first = nodes.add_level(
            torch.randint(0, 9, (batch, top_k), generator=generator), torch.full((batch, top_k), -1), scores
        )
        frontier = torch.arange(top_k).expand(batch, -1)
        for _ in range(3):
            steps = -torch.randint(0, 2, (batch, top_k, top_k), generator=generator).float()
            children = (scores[..., None] + steps).flatten(1)
            parents = (first + frontier).repeat_interleave(top_k, dim=1)
            tokens = torch.randint(0, 9, (batch, top_k * top_k), generator=generator)
            first = nodes.add_level(tokens, parents, children)
            scores, frontier = children.topk(top_k, dim=1)
        for size in (1, 5, 11, 200):
            tree = nodes.best_tree(torch.zeros(batch, 1, dtype=torch.long), size)
            assert tree.num_nodes == 1 + min(size, len(nodes))
            assert is_closed(tree), f"case {case}, {size} tokens"


def test_root_only():
    tree = DraftTree.root_only(torch.tensor([[3], [4]]))
    assert tree.num_nodes == 1
    assert tree.depths.tolist() == [[0], [0]]
    assert DraftedNodes().best_tree(torch.tensor([[3]]), 5).tokens.tolist() == [[3]]
