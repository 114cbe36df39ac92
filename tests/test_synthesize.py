"""The target writes training data."""

import json

import pytest
import torch
from conftest import make_target
from test_data import MARKERS, WORDS, make_tokenizer

from fspad.trainer.data import prepare_dataset
from fspad.trainer.synthesize import complete, synthesize, write_prompts

PROMPTS = ["hello you", "bye", "hi hi hi now", "you", "now bye hello"]


def make_pair(family="llama", **kwargs):
    target = make_target(family, **{"vocab_size": len(WORDS), "sharpness": 3.0, **kwargs})
    target.generation_config.eos_token_id = 1
    return target, make_tokenizer(MARKERS)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_greedy_batch_is_generate_row_by_row(family):
    target = make_target(family)
    torch.manual_seed(2)
    prompts = [torch.randint(97, (length,)).tolist() for length in (3, 9, 1, 5, 7, 4)]
    plain = [target.generate(torch.tensor([p]), max_new_tokens=20, do_sample=False)[0, len(p) :] for p in prompts]
    # Two tokens that greedy decoding writes here and there, so that rows end at different steps.
    end_ids = [plain[0][4].item(), plain[3][9].item()]
    answers = complete(target, prompts, [0.0] * 6, 20, end_ids)
    expected = []
    for tokens in (row.tolist() for row in plain):
        stop = next((i + 1 for i, token in enumerate(tokens) if token in end_ids), 20)
        expected.append(tokens[:stop])
    assert answers == expected
    assert len({len(answer) for answer in answers}) > 1


def test_each_row_has_its_own_temperature():
    target = make_target()
    greedy = target.generate(torch.tensor([[5, 6]]), max_new_tokens=12, do_sample=False)[0, 2:].tolist()
    answers = complete(target, [[5, 6]] * 8, [0.0, 1.0] * 4, 12, [])
    assert all(answer == greedy for answer in answers[::2])
    assert len({tuple(answer) for answer in answers[1::2]}) == 4


def test_sampling_follows_the_targets_distribution():
    target = make_target(vocab_size=8)
    with torch.no_grad():
        probs = (target(torch.tensor([[1, 2, 3]])).logits[0, -1] / 0.7).softmax(-1)
    draws = torch.tensor(complete(target, [[1, 2, 3]] * 4000, [0.7] * 4000, 1, []))[:, 0]
    frequencies = torch.bincount(draws, minlength=8) / 4000
    assert (frequencies - probs).abs().max() < 0.03


def test_rows_are_what_the_trainer_reads(tmp_path):
    target, tokenizer = make_pair()
    path = tmp_path / "new" / "dialogs.jsonl"
    assert synthesize(target, tokenizer, PROMPTS, path, batch_size=2, max_new_tokens=6) == 5
    rows = read(path)
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["temperature"] for row in rows] == [0.0, 1.0, 0.0, 1.0, 0.0]
    for row, prompt in zip(rows, PROMPTS, strict=True):
        assert set(row) == {"index", "temperature", "messages", "prompt_ids", "response_ids"}
        assert row["messages"][0] == {"role": "user", "content": prompt}
        assert row["messages"][1]["role"] == "assistant"
        text = f"<user> {prompt} </s> end <assistant>"
        assert row["prompt_ids"] == [WORDS.index(word) for word in text.split()]
        assert 1 <= len(row["response_ids"]) <= 6

    from datasets import Dataset

    prepared = prepare_dataset(Dataset.from_list([rows[0], rows[2]]), None)
    assert prepared[0]["input_ids"] == rows[0]["prompt_ids"] + rows[0]["response_ids"]


def test_interrupted_run_goes_on(tmp_path):
    target, tokenizer = make_pair()
    path = tmp_path / "dialogs.jsonl"
    arguments = {"temperatures": [0.0], "batch_size": 2, "max_new_tokens": 6}
    synthesize(target, tokenizer, PROMPTS, path, **arguments)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:17])
    assert synthesize(target, tokenizer, PROMPTS, path, **arguments) == 2
    assert path.read_bytes() == whole
    assert synthesize(target, tokenizer, PROMPTS, path, **arguments) == 0
    assert synthesize(target, tokenizer, [*PROMPTS, "hi"], path, **arguments) == 1
    assert path.read_bytes().startswith(whole)


def test_answers_to_other_prompts_are_not_gone_on_with(tmp_path):
    tokenizer = make_tokenizer(MARKERS)
    target = make_target(vocab_size=len(tokenizer))
    file = tmp_path / "dialogs.jsonl"
    synthesize(target, tokenizer, ["hello you", "bye"], file, max_new_tokens=3)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="one to another prompt in line 1"):
        synthesize(target, tokenizer, ["now", "hi hi"], file, max_new_tokens=3)
    assert file.read_bytes() == before


def test_target_writes_prompts():
    target, tokenizer = make_pair()
    prompts = list(write_prompts(target, tokenizer, count=5, batch_size=16, max_new_tokens=8))
    assert len(set(prompts)) == 5
    special = set(tokenizer.all_special_tokens)
    assert all(prompt.strip() and not special & set(prompt.split()) for prompt in prompts)


def test_target_that_cannot_write_prompts():
    target, tokenizer = make_pair()
    with torch.no_grad():
        target.get_output_embeddings().weight.zero_()
    target.get_output_embeddings().bias = torch.nn.Parameter(torch.tensor([0.0, 50.0] + [0.0] * (len(WORDS) - 2)))
    with pytest.raises(RuntimeError, match="got none in ten batches after 0"):
        list(write_prompts(target, tokenizer, count=1, batch_size=2, max_new_tokens=4))
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match="text before the user's turn"):
        list(write_prompts(target, tokenizer, count=1))
