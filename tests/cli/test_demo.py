"""What `fspad demo` says of what it measured."""

import pytest
import torch

from fspad.bench.exactness import Exactness
from fspad.bench.measuring import Answer, Comparison
from fspad.cli import demo, loading
from fspad.cli.demo import check_in_float32, verdict
from helpers.models import make_head, make_target

SAME = Exactness(3, 0, 0)
# 1 s of prefill and 10 steps of 0.5 s
PLAIN = Answer([7] * 11, 6.0, prefill_seconds=1.0)


def compare_with(seconds, draft_seconds, verify_seconds):
    """An answer of 4 steps, of 2.5 tokens each."""
    return Comparison([PLAIN], [Answer([7] * 11, seconds, [4, 3, 2, 1], draft_seconds, verify_seconds, 1.0)])


def test_faster():
    text = verdict(compare_with(3.0, 0.5, 1.5), SAME)
    assert text == "2.00x faster than plain generate (tau 2.50); fp32 check: identical."


def test_slower_says_why():
    text = verdict(compare_with(8.0, 2.0, 5.0), SAME)
    assert text == (
        "0.75x the speed of plain generate: a step takes as long as 3.50 plain ones (2.50 for verification, 1.00 for "
        "drafting) and yields 2.50 tokens (tau); fp32 check: identical."
    )


def test_slower_without_drafts():
    fallback = Comparison([PLAIN], [Answer([7] * 11, 8.0, [1] * 10, 0.0, 0.0, 1.0)])
    assert verdict(fallback, SAME).startswith("0.75x the speed of plain generate, as nothing was drafted; fp32 check")


@pytest.mark.parametrize(
    ("exactness", "text"),
    [
        (Exactness(2, 1, 0), "identical but for near-ties in 1."),
        (Exactness(2, 0, 1), "1 of 3 answers DIFFER, which must not be: please report this."),
        (None, "no memory for it."),
    ],
)
def test_every_outcome_of_the_check(exactness, text):
    assert verdict(compare_with(3.0, 0.5, 1.5), exactness).endswith(f"; fp32 check: {text}")


def test_check_is_in_float32():
    target = make_target().bfloat16()
    head = make_head(target).bfloat16()
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    assert check_in_float32(target, head, [inputs] * 2) == Exactness(2, 0, 0)
    assert target.dtype == head.dtype == torch.float32


def test_check_that_has_no_room_is_left_out(monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(demo, "compare", fail)
    target = make_target()
    assert check_in_float32(target, make_head(target), []) is None


def test_dtype_by_name_or_by_the_device(monkeypatch):
    monkeypatch.setattr(loading, "native_dtype", lambda device: torch.bfloat16 if device == "some" else None)
    assert loading.choose_dtype("auto", "some") == torch.bfloat16
    assert loading.choose_dtype("float32", "some") == torch.float32
