import random

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import (
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fspad import sampling_noise as module
from fspad.sampling_noise import SamplingNoise, sampling_noise
from helpers.models import make_head, make_target

CPU = torch.device("cpu")
VOCAB = 300
WARPERS = {
    "none": [],
    "cold": [TemperatureLogitsWarper(0.6)],
    "hot": [TemperatureLogitsWarper(1.7)],
    "top-k": [TemperatureLogitsWarper(1.3), TopKLogitsWarper(5)],
    "top-p": [TopPLogitsWarper(0.4)],
    "min-p": [TemperatureLogitsWarper(1.2), MinPLogitsWarper(0.2)],
    "all": [TemperatureLogitsWarper(0.8), TopKLogitsWarper(20), TopPLogitsWarper(0.5)],
}


def draw(logits: torch.Tensor, warpers: list) -> torch.Tensor:
    """What plain sampling draws, of shape `(batch, 1)`."""
    scores = LogitsProcessorList(warpers)(None, logits.clone())
    return torch.multinomial(scores.softmax(dim=-1), num_samples=1)


@pytest.mark.parametrize("warpers", WARPERS.values(), ids=WARPERS)
@pytest.mark.parametrize("batch", [1, 3])
def test_who_knows_the_logits_foresees_the_draw(warpers, batch):
    torch.manual_seed(0)
    noise = sampling_noise(LogitsProcessorList(warpers), (batch, VOCAB), CPU)
    drawn, rng = set(), random.Random(0)
    for _ in range(30):
        # So unequal that what truncation by probability looks at has all of it
        logits = 6 * torch.randn(4, batch, VOCAB)
        noise.begin()
        foreseen = []
        for index in range(4):
            perturbed, columns = noise.perturb(logits[index][:, None], None, index)
            best = perturbed.argmax(dim=-1, keepdim=True)
            foreseen.append((best if columns is None else columns.gather(-1, best))[:, 0])
        # As a step that accepts one or two drafts does
        for index in range(rng.randint(1, 2)):
            assert torch.equal(foreseen[index], draw(logits[index], warpers))
            drawn.update(foreseen[index].flatten().tolist())
    assert len(drawn) > 20


def test_a_trimmed_vocabulary_has_the_noise_of_its_tokens():
    for warpers in ([], [TopKLogitsWarper(4)]):
        token_ids = torch.tensor([7, 200, 3, 250, 11])
        logits = torch.full((1, VOCAB), -torch.inf)
        logits[0, token_ids] = torch.randn(5)
        noise = SamplingNoise(LogitsProcessorList(warpers), (1, VOCAB), CPU)
        for _ in range(10):
            noise.begin()
            perturbed, columns = noise.perturb(logits[:, None, token_ids], token_ids, 0)
            best = perturbed.argmax(dim=-1)
            best = best if columns is None else columns[0, 0, best]
            assert token_ids[best].item() == draw(logits, warpers).item()


def test_the_generator_is_only_read():
    noise = SamplingNoise(LogitsProcessorList(), (1, VOCAB), CPU)
    state = torch.get_rng_state()
    noise.begin()
    first = noise.of_draw(2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.empty(1, VOCAB).exponential_()
    noise.begin()
    assert noise.of_draw(1) is first  # drawn once
    torch.rand(1)  # somebody else has drawn
    noise.begin()
    expected = torch.empty(1, VOCAB).exponential_()
    assert torch.equal(noise.of_draw(0), expected)


@pytest.mark.parametrize("batch", [1, 3])
def test_draws_are_those_of_torch(batch, monkeypatch):
    noise = SamplingNoise(LogitsProcessorList(), (batch, VOCAB), CPU)
    multinomial, calls = torch.multinomial, []
    monkeypatch.setattr(torch, "multinomial", lambda *args, **kwargs: calls.append(1) or multinomial(*args, **kwargs))
    rng, own = random.Random(0), torch.Generator().manual_seed(0)
    for step in range(20):
        foreseen = rng.randint(0, 4)
        noise.begin()
        if foreseen:
            noise.of_draw(foreseen - 1)
        if step % 5 == 4:
            torch.rand(1)  # somebody else has drawn
        for _ in range(rng.randint(1, 6)):
            probabilities = (3 * torch.randn(batch, VOCAB, generator=own)).softmax(dim=-1)
            state = torch.get_rng_state()
            expected, after = multinomial(probabilities, num_samples=1), torch.get_rng_state()
            torch.set_rng_state(state)
            assert torch.equal(noise.draw(probabilities), expected)
            assert torch.equal(torch.get_rng_state(), after)
    assert 0 < len(calls) < 40  # most of about 70 draws were foreseen


def test_what_cannot_be_drawn_from_is_refused_as_by_torch():
    noise = SamplingNoise(LogitsProcessorList(), (1, VOCAB), CPU)
    noise.begin()
    noise.of_draw(0)
    with pytest.raises(RuntimeError, match="probability tensor contains"):
        noise.draw(torch.full((1, VOCAB), torch.nan))


def test_without_noise_the_logits_stay_those_of_the_head():
    logits = torch.randn(1, 2, VOCAB)
    noise = SamplingNoise(LogitsProcessorList([TemperatureLogitsWarper(1e-6)]), (1, VOCAB), CPU)
    noise.begin()
    torch.testing.assert_close(noise.perturb(logits, None, 0)[0], logits, atol=1e-4, rtol=0)


def test_a_device_that_draws_in_another_way_is_noticed(monkeypatch):
    assert sampling_noise(LogitsProcessorList(), (1, VOCAB), CPU) is not None
    module._is_foreseen.cache_clear()
    monkeypatch.setattr(torch, "multinomial", lambda p, num_samples, generator: torch.rand(1, generator=generator) > 2)
    assert sampling_noise(LogitsProcessorList(), (1, VOCAB), CPU) is None
    module._is_foreseen.cache_clear()


def test_other_processors_are_left_to_the_target():
    noise = SamplingNoise(LogitsProcessorList([NoBadWordsLogitsProcessor([[5]])]), (1, VOCAB), CPU)
    noise.begin()
    assert noise.perturb(torch.randn(1, 1, VOCAB), None, 0)[0].isfinite().all()


@pytest.mark.parametrize("options", [{}, {"top_k": 0}, {"temperature": 0.5, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("num_draft_tokens", [12, "auto"])
def test_sampled_text_stays_the_same(options, num_draft_tokens):
    target = make_target("llama", vocab_size=97)
    head = make_head(target, num_draft_tokens=num_draft_tokens)
    prompt = torch.tensor([[1, 2, 3, 4, 5]])
    for seed in range(3):
        outputs = []
        for assistant in (None, head):
            torch.manual_seed(seed)
            outputs.append(
                target.generate(prompt, assistant_model=assistant, max_new_tokens=30, do_sample=True, **options)
            )
            outputs.append(torch.rand(1))
        assert torch.equal(outputs[0], outputs[2])
        assert torch.equal(outputs[1], outputs[3])  # no random number was drawn too many
