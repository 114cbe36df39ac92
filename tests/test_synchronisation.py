"""How often a step makes the host wait for the device. On an accelerator every wait costs about as much as a draft level.

Only a processor is here, so what would wait is counted instead: looks at values (`item`, `tolist`, `bool`, ...), sizes that
depend on values (`nonzero`, masks as indices), and uploads of Python lists. Inside of the target's forward pass nothing is
counted: plain decoding has that too.
"""

import traceback

import pytest
import torch
from comparing import generate
from conftest import make_head, make_target
from torch.utils._python_dispatch import TorchDispatchMode

from fspad import acceptance
from fspad.decoding_loop import DecodingLoop
from fspad.head_source import HeadSource

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,  # item, int, float, bool, and what branches on a tensor
    aten.nonzero.default,
    aten.masked_select.default,
    aten.unique_consecutive.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.equal.default,
    aten.lift_fresh.default,  # torch.tensor of a list
}


class Waits(TorchDispatchMode):
    """Notes where the host would wait, step by step."""

    def __init__(self):
        super().__init__()
        self.steps = []
        self.is_counting = False

    def note(self, what):
        if self.is_counting:
            stack = [f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}" for frame in traceback.extract_stack()[:-2]]
            self.steps[-1].append(f"{what} at {' < '.join(stack[::-1][:6])}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_mask = func is aten.index.Tensor and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if func in WAITS or is_mask:
            self.note(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch):
    """Counts while the loop decodes as it does on an accelerator."""
    monkeypatch.setattr(acceptance, "_walk", acceptance._walk_ahead)
    original_init = HeadSource.__init__

    def init(self, *args):
        original_init(self, *args)
        self.looks_between_levels = False

    monkeypatch.setattr(HeadSource, "__init__", init)
    mode = Waits()
    for name in ("tolist", "cpu", "numpy"):  # these come by no dispatcher on a processor
        original = getattr(torch.Tensor, name)

        def noted(self, *args, name=name, original=original, **kwargs):
            mode.note(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, noted)
    step = DecodingLoop._step

    def counted_step(self, input_ids):
        mode.steps.append([])
        mode.is_counting = True
        try:
            with mode:
                return step(self, input_ids)
        finally:
            mode.is_counting = False

    monkeypatch.setattr(DecodingLoop, "_step", counted_step)
    return mode


def count(waits, target, head, **options):
    """The places at which each step waits."""
    hooks = [
        target.register_forward_pre_hook(lambda *_: setattr(waits, "is_counting", False)),
        target.register_forward_hook(lambda *_: setattr(waits, "is_counting", True)),
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


@pytest.mark.parametrize("lookup", [False, True], ids=["head", "head and lookup"])
@pytest.mark.parametrize("options", [{"do_sample": False}, SAMPLING], ids=["greedy", "sampling"])
@pytest.mark.parametrize("num_layers", [2, 8])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_waits_of_a_step(waits, family, num_layers, options, lookup):
    layers = {"num_hidden_layers": num_layers}
    if family == "gemma3":
        layers["layer_types"] = ["sliding_attention", "full_attention"] * (num_layers // 2)
    target = make_target(family, vocab_size=9, **layers)
    for depth, num_draft_tokens in ((1, 5), (5, 59)):
        head = make_head(target, draft_depth=depth, num_draft_tokens=num_draft_tokens, lookup=lookup)
        steps = count(waits, target, head, max_new_tokens=30, eos_token_id=8, **options)
        most = max(steps, key=len)
        assert len(most) <= 3, "\n".join(most)
