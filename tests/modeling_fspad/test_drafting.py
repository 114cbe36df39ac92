"""A drafter: several sources, one tree."""

import torch

from fspad.draft_size import FixedSize
from fspad.draft_source import DraftSource
from fspad.drafting import Drafter
from helpers.drafters import CPU, emitted


class Paths(DraftSource):
    """Proposes the same paths at every step, and remembers what it was asked."""

    def __init__(self, *paths, log_prob=-1.0):
        self.paths, self.log_prob = paths, log_prob
        self.emitted, self.asked = [], []

    def extend(self, emitted):
        self.emitted.append(emitted)

    def propose(self, candidates, size, max_depth):
        self.asked.append(([len(row) for row in candidates], max_depth))
        for row in candidates:
            for path in self.paths:
                node = 0
                for depth, token in enumerate(path, start=1):
                    node = row.add(node, token, depth * self.log_prob)


def shown(*roots):
    return emitted(torch.zeros(len(roots), 1, 4), torch.zeros(len(roots), 1, 4), roots)


def test_paths_of_several_sources_merge():
    one, other = Paths([1, 2, 3]), Paths([1, 2, 4], [5], log_prob=-0.5)
    drafter = Drafter([one, other], FixedSize(10, 5))
    drafter.extend(shown(9))
    tree = drafter.draft(7, CPU)
    assert tree.token_lists == [[9, 1, 2, 3, 4, 5]]
    assert tree.parent_lists == [[0, 0, 1, 2, 2, 0]]
    assert one.emitted == other.emitted
    assert one.asked == [([1], 7)]
    assert other.asked == [([4], 7)], "later sources see what those before them have proposed"


def test_the_best_of_all_sources_are_verified():
    drafter = Drafter([Paths([1, 2, 3]), Paths([4, 5], log_prob=-0.25)], FixedSize(3, 5))
    drafter.extend(shown(9))
    tree = drafter.draft(7, CPU)
    assert tree.token_lists == [[9, 1, 4, 5]]
    assert tree.parent_lists == [[0, 0, 0, 2]]


def test_the_root_is_the_last_emitted_token_of_each_row():
    drafter = Drafter([Paths([1])], FixedSize(3, 5))
    drafter.extend(shown(9, 8))
    drafter.extend(shown(7, 6))
    tree = drafter.draft(7, CPU)
    assert tree.token_lists == [[7, 1], [6, 1]]


def test_nothing_is_drafted_that_could_not_be_emitted():
    source = Paths([1])
    drafter = Drafter([source], FixedSize(3, 5))
    drafter.extend(shown(9))
    assert drafter.draft(0, CPU).token_lists == [[9]]
    assert source.asked == []


def test_sources_that_know_nothing():
    drafter = Drafter([Paths()], FixedSize(3, 5))
    drafter.extend(shown(9))
    assert drafter.draft(3, CPU).token_lists == [[9]]
