"""Packed layers compute what the layers compute, and only where they can."""

import copy

import pytest
import torch
from torch import nn

from fspad import packed_linear
from fspad.head_source import RUNS_BEFORE_PACKING
from fspad.packed_linear import PackedLinear, can_pack, packed
from fspad.target import LMHead
from helpers.models import make_head, make_target

has_kernels = pytest.mark.skipif(
    not packed_linear._has_kernels(torch.float32), reason="this processor has no packed layers"
)
DTYPES = [torch.float32, torch.bfloat16]


@has_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 40])
def test_a_packed_layer_computes_what_the_layer_computes(dtype, bias, rows):
    if not packed_linear._has_kernels(dtype):
        pytest.skip(f"this processor has no packed layers of {dtype}")
    torch.manual_seed(0)
    layer = nn.Linear(48, 33, bias=bias, dtype=dtype)
    inputs = torch.randn(2, rows, 48, dtype=dtype)
    with torch.no_grad():
        output = PackedLinear(layer.weight, layer.bias)(inputs)
        torch.testing.assert_close(output, layer(inputs))
    assert output.shape == (2, rows, 33)


@has_kernels
@pytest.mark.parametrize("partial_alignment", [False, True])
def test_a_packed_head_drafts_the_same_and_leaves_the_head_as_it_is(partial_alignment):
    target = make_target()
    head = make_head(target, partial_alignment=partial_alignment)
    before = copy.deepcopy(head.state_dict())
    other = packed(head)
    assert sum(isinstance(module, PackedLinear) for module in other.modules()) == sum(
        isinstance(module, nn.Linear) for module in head.modules()
    )
    assert not any(isinstance(module, PackedLinear) for module in head.modules())
    features, embeds = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    with torch.no_grad():
        ours, plain = other(features, embeds), head(features, embeds)
    torch.testing.assert_close(ours.predict, plain.predict)
    torch.testing.assert_close(ours.regress, plain.regress)
    assert (other.device, other.dtype) == (head.device, head.dtype)
    torch.testing.assert_close(head.state_dict(), before)


def test_what_computes_in_a_way_of_its_own_stays_as_it_is():
    head = make_head(make_target())
    layer = head.layer.mlp.down_proj
    layer.forward = layer.forward  # as accelerate does
    assert packed(head) is head
    hooked = make_head(make_target())
    hooked.layer.mlp.down_proj.register_forward_hook(lambda module, inputs, output: output)
    assert type(packed(hooked).layer.mlp.down_proj) is nn.Linear
    assert not can_pack(torch.empty(4, 4, device="meta"))
    assert not can_pack(torch.empty(4, 4, dtype=torch.float64))
    assert not can_pack(torch.zeros(4, 4, dtype=torch.int8))
    with torch.autocast("cpu"):
        assert not can_pack(torch.zeros(4, 4))


@has_kernels
def test_a_trimmed_lm_head_is_packed_and_a_whole_one_is_not_copied():
    target = make_target(vocab_size=97)
    features = torch.randn(1, 3, 32)
    trimmed, whole = LMHead(target, torch.arange(0, 97, 2)), LMHead(target)
    plain = trimmed(features)
    trimmed.pack()
    whole.pack()
    assert trimmed.packed is not None
    assert whole.packed is None
    torch.testing.assert_close(trimmed(features), plain)


@has_kernels
def test_a_call_packs_once_it_pays(monkeypatch):
    """And answers the same, whether it packs or not."""
    target = make_target()
    head = make_head(target, num_draft_tokens=6, draft_depth=2)
    made, make = [], PackedLinear.__init__

    def counted(self, *arguments):
        made.append(self)
        make(self, *arguments)

    monkeypatch.setattr(PackedLinear, "__init__", counted)
    prompt = torch.tensor([[1, 2, 3]])
    target.generate(prompt, assistant_model=head, max_new_tokens=2, do_sample=False)
    assert not made
    ours = target.generate(prompt, assistant_model=head, max_new_tokens=RUNS_BEFORE_PACKING * 6, do_sample=False)
    layers = sum(isinstance(module, nn.Linear) for module in head.modules())
    assert len(made) == layers
    plain = target.generate(prompt, max_new_tokens=RUNS_BEFORE_PACKING * 6, do_sample=False)
    assert torch.equal(ours, plain)
