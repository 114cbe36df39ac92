"""The methods of a benchmark."""

import copy

import pytest
import torch

from fspad import FSPADConfig
from fspad.bench import methods
from fspad.bench.methods import Method, changed, choose_methods, head_hash, make_methods
from helpers.models import make_head, make_target

INPUTS = {"input_ids": torch.tensor([[5, 6, 7, 5, 6]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}


@pytest.fixture
def target():
    return make_target()


@pytest.fixture
def head(target):
    return make_head(target)


def names(made):
    return [method.name for method in made]


OURS = ["fspad", "fspad-no-lookup", "fspad-chain", "fspad-reference"]


def test_the_head_and_its_peers(target, head):
    assert names(make_methods(head, target)) == ["plain", "prompt-lookup", *OURS]
    other = make_head(target, seed=1)
    made = make_methods(head, target, {"eagle": other}, early_exit=2)
    assert names(made) == ["plain", "prompt-lookup", *OURS, "eagle", "early-exit"]
    assert [method.head for method in made if method.name in ("fspad", "eagle")] == [head, other]


def test_every_method_gives_the_plain_answer(target, head):
    made = make_methods(head, target, {"eagle": make_head(target, seed=1, partial_alignment=False)}, early_exit=2)
    answers = {method.name: method.answer(target, INPUTS, 10, 0.0) for method in made}
    assert {tuple(answer.token_ids) for answer in answers.values()} == {tuple(answers["plain"].token_ids)}
    assert answers["plain"].accept_lengths == []
    assert all(answer.accept_lengths for name, answer in answers.items() if name != "plain")


def test_settings_are_those_of_one_method_alone(target, head, monkeypatch):
    head.config.lookup, head.config.num_draft_tokens = True, "auto"
    seen = {}

    def measure(target, inputs, head, *args, **options):
        config = head and head.config
        return head and (config.lookup, config.draft_top_k, config.num_draft_tokens)

    monkeypatch.setattr(methods, "measure", measure)
    for method in make_methods(head, target):
        seen[method.name] = method.answer(target, INPUTS, 10, 0.0)
    assert [seen[name] for name in OURS] == [
        (True, 10, "auto"),
        (False, 10, "auto"),
        (False, 1, "auto"),
        (False, 10, 59),
    ]
    assert (head.config.lookup, head.config.draft_top_k, head.config.num_draft_tokens) == (True, 10, "auto")


def test_settings_are_restored_after_an_error():
    config = FSPADConfig(vocab_size=97, hidden_size=32, num_attention_heads=4)
    before = config.draft_depth
    with pytest.raises(AttributeError, match="missing"), changed(config, {"draft_depth": 1}):
        config.missing  # noqa: B018
    assert config.draft_depth == before


def test_choice_by_name(target, head):
    made = make_methods(head, target)
    assert choose_methods(made, None) == choose_methods(made, []) == made
    assert names(choose_methods(made, ["fspad"])) == ["plain", "fspad"]
    with pytest.raises(ValueError, match=r"expected `--method` to be one of plain, prompt-lookup, .*, got 'medusa'"):
        choose_methods(made, ["medusa"])


def test_impossible_methods_are_refused(target, head):
    with pytest.raises(ValueError, match="two of 'fspad': rename"):
        make_methods(head, target, {"fspad": head})
    with pytest.raises(ValueError, match="between 1 and 2, got 3"):
        make_methods(head, target, early_exit=3)


def test_hash_tells_heads_apart(target, head, tmp_path):
    head.save_pretrained(tmp_path)
    again = type(head).from_pretrained(tmp_path)
    assert head_hash(again) == head_hash(head)
    assert len(head_hash(head)) == 64
    changes = [copy.deepcopy(head) for _ in range(3)]
    changes[0].config.draft_top_k = 3
    with torch.no_grad():
        next(changes[1].parameters()).view(-1)[0] += 1e-6
    changes[2].bfloat16()
    assert len({head_hash(head) for head in [head, *changes]}) == 4


def test_a_method_is_plain_by_default():
    assert Method("some") == Method("some", None, {}, {})
