"""How often a step makes the host wait for the device. On an accelerator every wait costs about as much as a draft level.

Only a processor is here, so what would wait is counted instead: looks at values (`item`, `tolist`, `bool`, ...), sizes that
depend on values (`nonzero`, masks as indices), and uploads of Python lists. Inside of the target's forward pass nothing is
counted: plain decoding has that too.
"""

import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation.streamers import BaseStreamer

from fspad import acceptance
from fspad.decoding_loop import DecodingLoop
from fspad.head_source import HeadSource
from fspad.sampling_noise import SamplingNoise
from helpers.comparing import generate
from helpers.models import make_head, make_target

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,  # item, int, float, bool, and what branches on a tensor
    aten.nonzero.default,
    aten.masked_select.default,
    aten.unique_consecutive.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.equal.default,
}


class Waits(TorchDispatchMode):
    """Notes where the host would wait, step by step."""

    def __init__(self):
        super().__init__()
        self.steps = []
        self.in_step = self.in_target = False

    def note(self, what):
        if self.in_step and not self.in_target:
            stack = [f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}" for frame in traceback.extract_stack()[:-2]]
            self.steps[-1].append(f"{what} at {' < '.join(stack[::-1][:6])}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_mask = func is aten.index.Tensor and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        # Not of an empty list, nor of the number in `tensor[...] = 0`, which an accelerator writes by itself
        is_upload = func is aten.lift_fresh.default and args[0].dim() > 0 and args[0].numel() > 0
        if func in WAITS or is_mask or is_upload:
            self.note(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch):
    """Counts while the loop decodes as it does on an accelerator."""
    walk = acceptance._walk

    def accelerator_walk(tree, logits, input_ids, chooser):
        return (acceptance._walk_ahead if chooser.can_run_ahead else walk)(tree, logits, input_ids, chooser)

    monkeypatch.setattr(acceptance, "_walk", accelerator_walk)
    original_init = HeadSource.__init__

    def init(self, *args):
        original_init(self, *args)
        self.looks_between_levels = False

    monkeypatch.setattr(HeadSource, "__init__", init)
    noise_init = SamplingNoise.__init__

    def accelerator_noise(self, *args):
        noise_init(self, *args)
        self.is_reused = False

    monkeypatch.setattr(SamplingNoise, "__init__", accelerator_noise)
    mode = Waits()
    for name in ("tolist", "cpu", "numpy"):  # these come by no dispatcher on a processor
        original = getattr(torch.Tensor, name)

        def noted(self, *args, name=name, original=original, **kwargs):
            if self.dtype is not torch.uint8:  # states of generators lie in the host's memory, whatever they draw on
                mode.note(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, noted)
    tensor = torch.tensor

    def noted_tensor(data, *args, **kwargs):
        if isinstance(data, (bool, int, float)):
            mode.note("tensor of a number")
        return tensor(data, *args, **kwargs)

    monkeypatch.setattr(torch, "tensor", noted_tensor)
    step = DecodingLoop._step

    def counted_step(self, input_ids):
        mode.steps.append([])
        mode.in_step = True
        try:
            with mode:
                return step(self, input_ids)
        finally:
            mode.in_step = False

    monkeypatch.setattr(DecodingLoop, "_step", counted_step)
    return mode


def count(waits, target, head, **options):
    """The places at which each step waits."""
    hooks = [
        target.register_forward_pre_hook(lambda *_: setattr(waits, "in_target", True)),
        target.register_forward_hook(lambda *_: setattr(waits, "in_target", False)),
    ]
    waits.steps.clear()
    prompt = torch.tensor([[1, 2, 3, 4, 5]])
    plain = generate(target, prompt, seed=1, **options)
    ours = generate(target, prompt, head, seed=1, **options)
    for hook in hooks:
        hook.remove()
    assert torch.equal(plain.sequences, ours.sequences)
    assert len(waits.steps) == len(ours.accept_lengths)
    return waits.steps


SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 5, "top_p": 0.9}


def test_what_would_wait_is_seen(waits):
    tensor = torch.arange(4)
    for look in (
        lambda: int(tensor[1]),
        lambda: bool((tensor > 9).any()),
        lambda: tensor.tolist(),
        lambda: tensor[tensor > 1],
        lambda: tensor.nonzero(),
        lambda: tensor.unique(),
        lambda: torch.tensor([1, 2]),
        lambda: tensor[[0, 2]],
        lambda: torch.tensor(3),
    ):
        waits.steps.append([])
        waits.in_step = True
        with waits:
            look()
        waits.in_step = False
        assert len(waits.steps[-1]) >= 1


def test_what_does_not_wait_is_not_counted(waits):
    tensor = torch.arange(4.0)
    waits.steps.append([])
    waits.in_step = True
    with waits:
        tensor[1:] = 0
        tensor.masked_fill_(tensor > 1, 2).index_select(0, torch.arange(2)).softmax(-1)
        torch.multinomial(torch.ones(3), 1)
    waits.in_step = False
    assert waits.steps == [[]]


@pytest.mark.parametrize("lookup", [False, True], ids=["head", "head and lookup"])
@pytest.mark.parametrize("options", [{"do_sample": False}, SAMPLING], ids=["greedy", "sampling"])
@pytest.mark.parametrize("num_layers", [2, 4])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_waits_of_a_step(waits, family, num_layers, options, lookup):
    layers = {"num_hidden_layers": num_layers}
    if family == "gemma3":
        layers["layer_types"] = ["sliding_attention", "full_attention"] * (num_layers // 2)
    target = make_target(family, vocab_size=30, **layers)
    for depth, num_draft_tokens in ((1, 5), (5, 59)):
        head = make_head(target, draft_depth=depth, num_draft_tokens=num_draft_tokens, lookup=lookup)
        steps = count(waits, target, head, max_new_tokens=16, eos_token_id=29, **options)
        assert len(steps) > 4
        most = max(steps, key=len)
        assert len(most) <= 3, "\n".join(most)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False, "repetition_penalty": 1.2},
        {"do_sample": True, "min_p": 0.1},
        {"do_sample": False, "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])},
        {"do_sample": False, "attention_mask": torch.tensor([[1, 1, 1, 1, 1]])},
    ],
    ids=["repetition_penalty", "min_p", "padding", "mask without padding"],
)
@pytest.mark.parametrize("num_draft_tokens", ["auto", 1, 24])
def test_waits_with_other_options(waits, options, num_draft_tokens):
    target = make_target(vocab_size=30)
    head = make_head(target, num_draft_tokens=num_draft_tokens, lookup=True)
    steps = count(waits, target, head, max_new_tokens=16, **options)
    most = max(steps, key=len)
    assert len(most) <= 3, "\n".join(most)


def test_a_streamer_wants_each_token_at_once(waits):
    class Streamer(BaseStreamer):
        def put(self, value):
            pass

        def end(self):
            pass

    target = make_target(vocab_size=9)
    head = make_head(target)
    steps = count(waits, target, head, max_new_tokens=30, streamer=Streamer())
    assert max(map(len, steps)) > 3
