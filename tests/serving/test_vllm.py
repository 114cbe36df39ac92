"""Heads in vLLM, in fp32: they draft what they draft here, and the text is that of the target alone.

Run where vLLM is installed, which is an environment of its own: `.ci/serving` makes it.
"""

from collections import Counter

import pytest
import torch

from fspad.bench.smollm2 import find_smollm2, keep_dequantised
from fspad.cli.export import export_head
from fspad.cli.loading import find_shipped_head, load_head, load_target
from helpers.serving import make_pair, replay, save_pair
from helpers.vllm_runs import Run, run

pytest.importorskip("vllm", reason="vLLM is not installed: `.ci/serving` makes its environment")

VARIANTS = {
    "fspad": {},
    "eagle": {"feature_sampling": False, "partial_alignment": False},
    "feature-sampling": {"partial_alignment": False},
    "partial-alignment": {"feature_sampling": False},
    "trimmed": {"draft_vocab_size": 40},
    "gemma3": {"family": "gemma3"},
}
PROMPTS = [[5, 17, 3, 60], [8, 2, 44, 44, 9, 71, 30], [90, 1]]
STEPS, ACCEPTED = "vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens"


def greedy(target, prompt: list[int], max_new_tokens: int) -> list[int]:
    output = target.generate(torch.tensor([prompt]), max_new_tokens=max_new_tokens, do_sample=False)
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_drafted_chains_are_those_of_the_head(variant, tmp_path):
    folder, exported = save_pair(tmp_path, strength=0.1, **VARIANTS[variant])
    target, head = make_pair(strength=0.1, **VARIANTS[variant])
    result = run(Run(folder, PROMPTS, exported, one_by_one=True), tmp_path / "run")
    answers = [greedy(target, prompt, 32) for prompt in PROMPTS]
    assert result["answers"] == answers
    for prompt, answer, drafts in zip(PROMPTS, answers, result["drafts"], strict=True):
        chains = replay(head, target, prompt, answer, 4)
        assert drafts[: len(chains)] == chains


def test_two_workers_write_what_one_writes(tmp_path):
    target, exported = save_pair(tmp_path)
    trimmed_target, trimmed = save_pair(tmp_path / "trimmed", draft_vocab_size=40)
    for name, (folder, head) in {"whole": (target, exported), "trimmed": (trimmed_target, trimmed)}.items():
        one, two = (
            run(Run(folder, PROMPTS, head, options={"tensor_parallel_size": size}), tmp_path / f"{name}-{size}")
            for size in (1, 2)
        )
        assert one["answers"] == two["answers"]
        assert one["counters"] == two["counters"]
        assert 0.3 < one["counters"][ACCEPTED] / one["counters"][STEPS] < 3.7, (
            "some drafts are accepted, and some are not"
        )


def test_pipelines_are_refused(tmp_path):
    folder, exported = save_pair(tmp_path)
    with pytest.raises(AssertionError, match="expected pipeline_parallel_size 1"):
        run(Run(folder, PROMPTS, exported, options={"pipeline_parallel_size": 2}), tmp_path / "run")


def test_sampling_has_the_distribution_of_the_target(tmp_path):
    folder, exported = save_pair(tmp_path)
    target, _ = make_pair()
    prompt, count = [5, 17, 3, 60], 4000
    options = {"temperature": 1.4, "top_k": 12, "top_p": 0.95, "max_tokens": 4}
    result = run(Run(folder, [prompt] * count, exported, sampling=options), tmp_path / "run")
    assert result["counters"][ACCEPTED] > 0
    first = Counter(answer[0] for answer in result["answers"]).most_common(1)[0][0]
    seen = Counter(tuple(answer[1:3]) for answer in result["answers"] if answer[0] == first)

    def next_probs(*tokens: int) -> torch.Tensor:
        with torch.no_grad():
            logits = target(torch.tensor([[*prompt, *tokens]])).logits[0, -1].double() / options["temperature"]
        kept = logits.topk(options["top_k"])
        probs = torch.zeros_like(logits).scatter_(0, kept.indices, kept.values.softmax(0))
        ordered, indices = probs.sort(descending=True)
        ordered[ordered.cumsum(0) - ordered >= options["top_p"]] = 0
        return torch.zeros_like(probs).scatter_(0, indices, ordered / ordered.sum())

    second = next_probs(first)
    expected = {}
    for token in second.nonzero().flatten().tolist():
        for other, prob in enumerate(next_probs(first, token).tolist()):
            if prob:
                expected[token, other] = second[token].item() * prob
    assert set(seen) <= set(expected), "nothing that the target cannot write"
    total = sum(seen.values())
    common = {pair for pair, prob in expected.items() if prob * total >= 5}
    cells = [(seen[pair], expected[pair] * total) for pair in common]
    cells.append((total - sum(cell[0] for cell in cells), total - sum(cell[1] for cell in cells)))
    statistic = sum((got - wanted) ** 2 / wanted for got, wanted in cells)
    freedom = len(cells) - 1
    assert freedom > 10
    # Chi-squared is near normal then: five standard deviations
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5, (statistic, freedom)


@pytest.mark.smollm2
@pytest.mark.skipif(find_smollm2() is None, reason="SmolLM2 is not here: `fspad demo` fetches it")
def test_shipped_head_drafts_as_here(tmp_path):
    export_head(find_shipped_head(), tmp_path / "exported")
    target, tokenizer = load_target(None, torch.float32)
    head = load_head(str(find_shipped_head()), torch.float32)
    texts = ["Name the planets of the solar system.", "Write a thank-you note to a friend who helped you move."]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        for text in texts
    ]
    common = {"target": str(keep_dequantised()), "prompts": prompts}
    plain = run(Run(**common), tmp_path / "plain")
    drafted = run(Run(**common, head=str(tmp_path / "exported"), one_by_one=True), tmp_path / "drafted")
    assert drafted["answers"] == plain["answers"]
    chains = [
        replay(head, target, prompt, answer, 4) for prompt, answer in zip(prompts, drafted["answers"], strict=True)
    ]
    for expected, drafts in zip(chains, drafted["drafts"], strict=True):
        assert drafts[: len(expected)] == expected
    tokens = sum(len(answer) - 1 for answer in drafted["answers"])
    steps = sum(map(len, chains))
    assert drafted["counters"][STEPS] == steps
    assert tokens / steps > 1.4
