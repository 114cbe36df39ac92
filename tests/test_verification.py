"""Exactness of verification: random targets, heads, prompts and options, greedy and sampled."""

import random

import pytest
import tokenizers
import torch
from comparing import assert_same, check_accept_lengths, generate
from conftest import FAMILIES, know_the_future, make_head, make_target
from transformers import PreTrainedTokenizerFast


def letter_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """The least tokenizer that `stop_strings` needs: one character a token, and the letters that it probes with."""
    letters = {chr(0x4E00 + i): i for i in range(vocab_size)}
    letters |= {letter: vocab_size + i for i, letter in enumerate("abcdef")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token=chr(0x4E00)))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def random_case(seed: int) -> tuple:
    """A random family, target, head, prompt and set of options."""
    rng = random.Random(seed)
    family = rng.choice(sorted(FAMILIES))
    # Small vocabularies make random heads right often, so that long paths are accepted
    vocab_size = rng.choice([5, 9, 30, 97])
    target = make_target(family, seed=seed % 7, vocab_size=vocab_size, sharpness=rng.choice([2.0, 6.0]))
    head = make_head(
        target,
        seed=seed % 5,
        feature_sampling=rng.random() < 0.5,
        partial_alignment=rng.random() < 0.5,
        draft_depth=rng.choice([0, 1, 3, 5]),
        draft_top_k=rng.choice([1, 2, 4, 10]),
        num_draft_tokens=rng.choice([1, 7, 24, 59]),
        draft_vocab_size=rng.choice([None, None, max(2, vocab_size // 2)]),
    )
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(1, vocab_size, (1, rng.randint(1, 40)), generator=generator)
    length = rng.randint(1, 60)
    options = {"max_new_tokens": length}
    if rng.random() < 0.3:
        options["repetition_penalty"] = rng.choice([1.1, 1.5, 0.8])
    if rng.random() < 0.3:
        options["eos_token_id"] = rng.sample(range(vocab_size), 2)
        options["min_new_tokens"] = rng.randint(0, length)
    if vocab_size >= 30 and rng.random() < 0.3:
        options["no_repeat_ngram_size"] = rng.choice([2, 3])
    if rng.random() < 0.2:
        forced = {step: rng.randrange(vocab_size) for step in range(0, 60, 3)}
        everything = list(range(vocab_size))
        start = prompt.shape[1]

        def allow(_, ids):
            step = len(ids) - start
            return [forced[step]] if step in forced else everything

        options["prefix_allowed_tokens_fn"] = allow
    if rng.random() < 0.2:
        tokenizer = letter_tokenizer(vocab_size)
        letters = [chr(0x4E00 + i) for i in range(vocab_size)]
        options["stop_strings"] = ["".join(rng.choices(letters, k=rng.choice([1, 2]))) for _ in range(2)]
        options["tokenizer"] = tokenizer
    return target, head, prompt, options


def compare(seed, monkeypatch, **options):
    target, head, prompt, case_options = random_case(seed)
    options |= case_options
    plain = generate(target, prompt, seed=seed, **options)
    if seed % 2:
        know_the_future(monkeypatch, plain.sequences, seed)
    ours = generate(target, prompt, head, seed=seed, **options)
    assert_same(plain, ours, f"{type(target).__name__} {options}")
    check_accept_lengths(ours, ours.sequences.shape[1] - prompt.shape[1])


@pytest.mark.parametrize("seed", range(200))
def test_greedy_is_plain_greedy(seed, monkeypatch):
    compare(seed, monkeypatch, do_sample=False)


@pytest.mark.parametrize("seed", range(200))
def test_sampling_draws_what_plain_sampling_draws(seed, monkeypatch):
    rng = random.Random(seed)
    compare(
        seed + 1000,
        monkeypatch,
        do_sample=True,
        temperature=rng.choice([0.3, 0.7, 1.0, 1.5]),
        top_k=rng.choice([0, 3, 50]),
        top_p=rng.choice([0.5, 0.9, 1.0]),
    )


def test_drafts_do_get_accepted_in_these_comparisons(monkeypatch):
    """They would prove little if every step emitted one token."""
    lengths = {0: [], 1: []}
    for seed in range(30):
        target, head, prompt, options = random_case(seed)
        with monkeypatch.context() as patch:
            if seed % 2:
                know_the_future(patch, generate(target, prompt, do_sample=False, **options).sequences, seed)
            output = generate(target, prompt, head, do_sample=False, **options)
        lengths[seed % 2] += output.accept_lengths.tolist()
    assert max(lengths[0]) >= 3, "random heads"
    assert max(lengths[1]) >= 9, "drafts that know the future"


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

    num_draws = 3000
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
