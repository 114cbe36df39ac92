"""Targets that load a head by themselves: `generate(..., custom_generate=FOLDER, trust_remote_code=True)`."""

import sys
import threading

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList, dynamic_module_utils
from transformers.generation.streamers import BaseStreamer

from helpers.models import make_head, make_target

PROMPT = torch.tensor([[1, 2, 3]])
GREEDY = {"max_new_tokens": 20, "do_sample": False}


class Collector(BaseStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.tokens.append("end")


class StopAt(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.fixture
def folder(tmp_path):
    """A folder with a head for `make_target(vocab_size=9)`."""
    make_head(make_target(vocab_size=9), seed=1).save_pretrained(tmp_path / "head")
    return tmp_path / "head"


def generate(target, folder, **options):
    return target.generate(PROMPT, custom_generate=str(folder), trust_remote_code=True, **options)


def kept_head(name):
    """The head that the file of a folder of this name keeps."""
    modules = [m for n, m in sys.modules.items() if n.endswith("custom_generate.generate") and f".{name}." in n]
    (head,) = {id(head): head for module in modules for head in module._kept.values()}.values()
    return head


@pytest.fixture(autouse=True)
def _forget_kept_heads():
    yield
    for name in [name for name in sys.modules if name.endswith("custom_generate.generate")]:
        del sys.modules[name]


def test_options_arrive_and_the_text_is_that_of_plain_decoding(folder):
    target = make_target(vocab_size=9)
    for options in (GREEDY, {"max_new_tokens": 20, "do_sample": True, "temperature": 0.7, "top_k": 5}):
        results = []
        for way in ({}, {"custom_generate": str(folder), "trust_remote_code": True}):
            streamer = Collector()
            torch.manual_seed(3)
            output = target.generate(
                PROMPT,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([StopAt(15)]),
                logits_processor=[lambda _, scores: scores.index_fill(1, torch.tensor([7]), -torch.inf)],
                return_dict_in_generate=True,
                output_scores=True,
                **way,
                **options,
            )
            results.append((output.sequences.tolist(), streamer.tokens, len(output.scores)))
        assert results[0] == results[1]
        assert output.sequences.shape[1] == 15
        assert type(output).__name__ == "FSPADGenerateOutput"
        assert output.accept_lengths.sum() == 11


def test_prompts_as_keyword_arguments_of_the_tokenizer(folder):
    target = make_target(vocab_size=9)
    inputs = {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)}
    ours = target.generate(**inputs, custom_generate=str(folder), trust_remote_code=True, **GREEDY)
    assert torch.equal(ours, target.generate(**inputs, **GREEDY))


def test_the_head_is_loaded_once_for_all_threads(folder, monkeypatch):
    stock, lock = dynamic_module_utils.get_imports, threading.Lock()

    def get_imports(filename):
        # Some releases of Python 3.11 and 3.12 fail if two threads parse code at a time, as transformers lets them
        with lock:
            return stock(filename)

    monkeypatch.setattr(dynamic_module_utils, "get_imports", get_imports)
    target, outputs = make_target(vocab_size=9), []
    threads = [threading.Thread(target=lambda: outputs.append(generate(target, folder, **GREEDY))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    plain = target.generate(PROMPT, **GREEDY)
    assert len(outputs) == 3
    assert all(torch.equal(output, plain) for output in outputs)
    head = kept_head("head")
    generate(target, folder, **GREEDY)
    assert kept_head("head") is head


def test_one_head_is_kept_and_it_has_the_targets_dtype(folder):
    generate(make_target(vocab_size=9), folder, **GREEDY)
    assert kept_head("head").dtype == torch.float32
    generate(make_target(vocab_size=9).bfloat16(), folder, **GREEDY)
    assert kept_head("head").dtype == torch.bfloat16


def test_a_folder_that_is_saved_again_is_loaded_again(folder):
    target = make_target(vocab_size=9)
    generate(target, folder, **GREEDY)
    other = make_head(target, seed=2)
    other.save_pretrained(folder)
    generate(target, folder, **GREEDY)
    assert torch.equal(kept_head("head").feature_sampling.fc.weight, other.feature_sampling.fc.weight)


def test_folders_of_the_same_name_and_folders_that_were_moved(folder, tmp_path, monkeypatch):
    """Both have the same code, and no folder may hold its own path, which means nothing elsewhere."""
    target = make_target(vocab_size=9)
    other = make_head(target, seed=2)
    other.save_pretrained(tmp_path / "elsewhere" / "head")
    for place, weight in ((folder, make_head(target, seed=1)), (tmp_path / "elsewhere" / "head", other)):
        generate(target, place, **GREEDY)
        assert torch.equal(kept_head("head").feature_sampling.fc.weight, weight.feature_sampling.fc.weight)
    folder.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(generate(target, "moved", **GREEDY), target.generate(PROMPT, **GREEDY))


def test_saved_folders_tell_nothing_of_the_machine(folder):
    assert str(folder.parent) not in (folder / "custom_generate" / "generate.py").read_text()
    assert [path.name for path in (folder / "custom_generate").iterdir()] == ["generate.py"]


def test_refused(folder):
    target = make_target(vocab_size=9)
    with pytest.raises(ValueError, match="got an `assistant_model` as well"):
        generate(target, folder, assistant_model=make_head(target), **GREEDY)
    function = target.load_custom_generate(str(folder), trust_remote_code=True)
    with pytest.raises(ValueError, match="got another caller: load the head with"):
        function(model=target, inputs=PROMPT)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        target.generate(PROMPT, custom_generate=str(folder), trust_remote_code=False, **GREEDY)
    with pytest.raises(ValueError, match="hidden"):
        generate(make_target(vocab_size=9, hidden_size=64), folder, **GREEDY)
