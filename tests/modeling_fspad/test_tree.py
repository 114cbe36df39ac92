import pytest
import torch

from fspad.tree import DraftTree


def test_depths_and_ancestors():
    tree = DraftTree([[7, 10, 11, 20, 22]], [[0, 0, 0, 1, 2]])
    assert tree.num_nodes == 5
    assert tree.tokens.tolist() == [[7, 10, 11, 20, 22]]
    assert tree.parents.tolist() == [[0, 0, 0, 1, 2]]
    assert tree.depths.tolist() == [[0, 1, 1, 2, 2]]
    assert tree.ancestors.dtype == torch.bool
    assert tree.ancestors[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 0, 1, 0, 1],
    ]


def test_rows_have_shapes_of_their_own():
    both = DraftTree([[1, 2, 3], [4, 5, 6]], [[0, 0, 1], [0, 0, 0]])
    assert both.depths.tolist() == [[0, 1, 2], [0, 1, 1]]
    for row in range(2):
        alone = DraftTree([both.token_lists[row]], [both.parent_lists[row]])
        assert torch.equal(alone.tokens[0], both.tokens[row])
        assert torch.equal(alone.ancestors[0], both.ancestors[row])


@pytest.mark.parametrize("tokens", [[3], [3, 4]])
def test_root_only(tokens):
    tree = DraftTree.root_only(tokens)
    assert tree.num_nodes == 1
    assert tree.tokens.tolist() == [[token] for token in tokens]
    assert tree.depths.tolist() == [[0]] * len(tokens)
    assert tree.ancestors.all()


def test_tensors_are_uploaded_once_and_where_they_are_wanted():
    tree = DraftTree([[1, 2]], [[0, 0]], "meta")
    tensors = tree.tokens, tree.parents, tree.depths, tree.ancestors
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert tree.tokens._base is tree.parents._base is tree.depths._base
