"""Walking down a verified tree: what is chosen, where it stops, and that running ahead of the host changes nothing."""

import random

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, MinPLogitsWarper

from fspad import acceptance
from fspad.acceptance import TokenChooser, accept
from fspad.tree import DraftTree
from helpers.models import make_head, make_target

PROMPT = torch.tensor([[1, 2, 7]])
# 7 -> {3, 4}, 4 -> {5, 6}, 6 -> {3}
TREE = DraftTree([[7, 3, 4, 5, 6, 3]], [[0, 0, 0, 2, 2, 4]])


def make_chooser(do_sample=False, processors=(), max_length=50, eos=(), **options):
    criteria = [MaxLengthCriteria(max_length)] + [EosTokenCriteria(torch.tensor(list(eos)))] * bool(eos)
    return TokenChooser(LogitsProcessorList(processors), StoppingCriteriaList(criteria), do_sample, **options)


def logits_that_choose(*tokens):
    """One token for each node."""
    return 9.0 * torch.nn.functional.one_hot(torch.tensor([tokens]), 10)


def test_the_walk_follows_what_the_target_chooses():
    accepted = accept(TREE, logits_that_choose(4, 0, 6, 0, 8, 0), PROMPT, make_chooser())
    assert accepted.path == [0, 2, 4]
    assert accepted.nodes.tolist() == [0, 2, 4]
    assert accepted.token_ids == [4, 6, 8]
    assert accepted.input_ids.tolist() == [[1, 2, 7, 4, 6, 8]]
    assert not accepted.is_done
    assert accepted.error is None


def test_without_an_accepted_draft_there_is_still_the_targets_own_token():
    accepted = accept(TREE, logits_that_choose(8, 4, 6, 0, 8, 0), PROMPT, make_chooser())
    assert (accepted.path, accepted.token_ids) == ([0], [8])


@pytest.mark.parametrize(
    ("stop", "emitted"), [({"eos": [6]}, [4, 6]), ({"max_length": 4}, [4]), ({"eos": [4, 6]}, [4])]
)
@pytest.mark.parametrize("walk", [acceptance._walk, acceptance._walk_ahead])
def test_the_walk_ends_where_plain_decoding_would_stop(walk, stop, emitted):
    accepted = walk(TREE, logits_that_choose(4, 0, 6, 0, 3, 0), PROMPT, make_chooser(**stop))
    assert accepted.token_ids == emitted
    assert accepted.path == [0, 2, 4][: len(emitted)]
    assert accepted.is_done


class FailingAfter(LogitsProcessor):
    def __init__(self, length, error):
        self.length, self.error = length, error

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= self.length:
            raise self.error
        return scores


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=repr)
def test_an_exception_is_handed_back_with_what_was_accepted_before_it(error):
    chooser = make_chooser(processors=[FailingAfter(5, error)])
    accepted = accept(TREE, logits_that_choose(4, 0, 6, 0, 3, 0), PROMPT, chooser)
    assert accepted.error is error
    # The node whose logits were asked for counts: plain decoding has its keys too
    assert accepted.path == [0, 2, 4]
    assert accepted.token_ids == [4, 6]


def test_an_interruption_while_running_ahead_keeps_the_root_alone():
    """Its keys are there in plain decoding too; of the tokens chosen on the device none has been looked at."""
    error = KeyboardInterrupt()
    chooser = make_chooser(processors=[FailingAfter(4, error)])
    accepted = acceptance._walk_ahead(TREE, logits_that_choose(4, 0, 6, 0, 3, 0), PROMPT, chooser)
    assert accepted.error is error
    assert (accepted.path, accepted.nodes.tolist(), accepted.token_ids) == ([0], [0], [])
    assert torch.equal(accepted.input_ids, PROMPT)


def random_tree(rng, vocab_size):
    tokens, parents, edges = [rng.randrange(vocab_size)], [0], set()
    for _ in range(rng.randrange(24)):
        edge = rng.randrange(len(tokens)), rng.randrange(vocab_size)
        if edge not in edges:
            edges.add(edge)
            parents.append(edge[0])
            tokens.append(edge[1])
    return DraftTree([tokens], [parents])


@pytest.mark.parametrize("do_sample", [False, True])
def test_running_ahead_gives_the_same_as_walking(do_sample):
    """The same tokens, nodes and scores, and the same random numbers for whatever comes next."""
    lengths = []
    for seed in range(150):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        vocab_size = rng.choice([2, 3, 5])
        tree = random_tree(rng, vocab_size)
        logits = 3 * torch.randn(1, tree.num_nodes, vocab_size)
        prompt = torch.cat([torch.randint(vocab_size, (1, rng.randrange(6))), tree.tokens[:, :1]], dim=1)
        processors = [
            RepetitionPenaltyLogitsProcessor(1.3), TemperatureLogitsWarper(0.7), TopKLogitsWarper(2),
            TopPLogitsWarper(0.8), MinPLogitsWarper(0.1),
        ]  # fmt: skip
        options = {
            "processors": rng.sample(processors, rng.randrange(4)),
            "max_length": prompt.shape[1] + rng.choice([1, 2, 3, 100]),
            "eos": rng.choice([(), (), (0,), (0, 1)]),
            "keep_scores": True,
            "keep_logits": True,
        }
        results = []
        for walk in (acceptance._walk, acceptance._walk_ahead):
            chooser = make_chooser(do_sample, **options)
            chooser.choose(prompt, logits[:, 0])  # what is there already stays
            assert chooser.can_run_ahead
            torch.manual_seed(seed)
            results.append((walk(tree, logits, prompt, chooser), chooser, torch.get_rng_state()))
        (one, one_chooser, one_state), (other, other_chooser, other_state) = results
        assert one.path == other.path
        assert one.token_ids == other.token_ids
        assert one.is_done == other.is_done
        assert torch.equal(one.nodes, other.nodes)
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one_state, other_state)
        for name in ("scores", "logits"):
            assert len(getattr(one_chooser, name)) == len(one.path) + 1
            for a, b in zip(getattr(one_chooser, name), getattr(other_chooser, name), strict=True):
                assert torch.equal(a, b)
        lengths.append(len(one.path))
    assert max(lengths) >= 4
    assert min(lengths) == 1


def test_only_what_keeps_no_state_is_run_ahead():
    assert make_chooser(True, [TemperatureLogitsWarper(0.5), TopKLogitsWarper(3)], eos=[4]).can_run_ahead
    assert not make_chooser(True, [NoRepeatNGramLogitsProcessor(2)]).can_run_ahead
    assert not make_chooser(True, streamer=object()).can_run_ahead

    class Custom(TemperatureLogitsWarper):
        pass

    class Criterion(MaxLengthCriteria):
        pass

    assert not make_chooser(True, [Custom(0.5)]).can_run_ahead
    chooser = make_chooser()
    chooser.stopping_criteria.append(Criterion(9))
    assert not chooser.can_run_ahead


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_generation_that_runs_ahead_is_plain_decoding(do_sample, monkeypatch):
    monkeypatch.setattr(acceptance, "_walk", acceptance._walk_ahead)
    for seed in range(6):
        target = make_target(vocab_size=9, seed=seed)
        options = {"do_sample": do_sample, "max_new_tokens": 30, "eos_token_id": 4, "repetition_penalty": 1.1}
        options |= {"return_dict_in_generate": True, "output_scores": True}
        outputs, states = [], []
        for assistant in (None, make_head(target, seed=seed)):
            torch.manual_seed(seed)
            outputs.append(target.generate(PROMPT, assistant_model=assistant, **options))
            states.append(torch.get_rng_state())
        assert torch.equal(outputs[0].sequences, outputs[1].sequences)
        assert torch.equal(*states)
        torch.testing.assert_close(outputs[1].scores, outputs[0].scores, atol=1e-4, rtol=1e-4)
        lengths = outputs[1].accept_lengths
        assert lengths.sum() == len(outputs[0].scores) - 1


@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"top_p": 0.8}], ids=str)
def test_sampled_distribution_is_the_targets(options):
    """Chi-squared test of three sampled tokens over a vocabulary of 8 against exact enumeration."""
    from scipy.stats import chisquare

    target = make_target(vocab_size=8, sharpness=2.0)
    head = make_head(target, draft_depth=2, draft_top_k=4, num_draft_tokens=20)
    prompt = torch.tensor([[1, 5, 2]])
    sequences = torch.cartesian_prod(*[torch.arange(8)] * 3)
    with torch.no_grad():
        logits = target(torch.cat([prompt.expand(len(sequences), -1), sequences], dim=1)).logits[:, 2:5]
    scores = logits / options.get("temperature", 1.0)
    if "top_p" in options:
        ascending, order = scores.sort(dim=-1)
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - options["top_p"]
        dropped[..., -1] = False
        scores = scores.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
    expected = scores.softmax(-1).gather(-1, sequences[..., None])[..., 0].prod(-1)

    num_draws = 600
    counts = torch.zeros(8**3)
    torch.manual_seed(0)
    for _ in range(num_draws):
        drawn = target.generate(prompt, assistant_model=head, do_sample=True, max_new_tokens=3, top_k=0, **options)[
            0, 3:
        ]
        counts[drawn[0] * 64 + drawn[1] * 8 + drawn[2]] += 1
    assert counts[expected == 0].sum() == 0
    # Rare sequences together, so that the test's approximation holds
    common = expected * num_draws >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]]) * num_draws
    keep = wanted > 0
    assert keep.sum() >= 8
    observed, wanted = observed[keep].double(), wanted[keep].double()
    assert chisquare(observed.numpy(), (wanted * observed.sum() / wanted.sum()).numpy()).pvalue > 1e-3
