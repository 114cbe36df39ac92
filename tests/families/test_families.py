"""One type for every way in which families differ; `python tests/families/matrix.py` runs all types and all cases."""

import pytest

from families.cases import CASES, NOT_REPEATED, check
from families.tiny_models import TinyType
from helpers.comparing import count_comparison, excuse

EVERYWHERE = ("sampled", "padded, sampled, eager", "second turn, padded")
POSITIONS = ("positions", "positions up to the limit", "limit")
WINDOWED = ("greedy", "window", "window, padded, eager", "outputs")
# The types, and what they are tried on beside the cases above
QUICK = {
    "llama": ("outputs, sdpa", "from embeddings", *POSITIONS),
    "llama (dynamic RoPE)": POSITIONS,
    "phi3 (longrope RoPE)": ("greedy", *POSITIONS),
    "phimoe (longrope RoPE)": ("greedy", *POSITIONS),
    "phi4_multimodal (longrope RoPE)": ("greedy", *POSITIONS),
    "kosmos-2.5 (image)": ("sampled", "padded"),
    "unlimited_ocr (image)": ("greedy", "padded"),
    # layers with windows, chunks, shared keys, latent keys, sinks
    "mistral": WINDOWED,
    "gemma3_text": WINDOWED,
    "gemma3n_text": WINDOWED,
    "gemma4_text": WINDOWED,
    "llama4_text": WINDOWED,
    "gpt_oss": WINDOWED,
    "deepseek_v3": ("eager",),
    # indexers and masks that choose among the keys
    "deepseek_v32": ("greedy", "window"),
    "hy_v4": ("greedy", "window"),
    "doge": ("greedy", "window"),
    # tables of positions, learned and computed, and none
    "gpt2": POSITIONS,
    "opt": POSITIONS,
    "bert": POSITIONS,
    "gptj": POSITIONS,
    "codegen": POSITIONS,
    "ctrl": POSITIONS,
    "mpt": POSITIONS,
    "bloom": POSITIONS,
    "xglm": POSITIONS,
    "gpt_neo": WINDOWED,
    "falcon": ("outputs", "outputs, sdpa"),
    # inputs of their own
    "cpmant": ("greedy", "padded"),
    "prophetnet": ("greedy", "padded"),
    "git": ("greedy", "padded"),
    # states that cannot be rolled back
    "mamba": (),
    "jamba": (),
    "qwen3_next": (),
    "lfm2": ("outputs",),
    "rwkv": (),
    "xlnet": (),
    # images
    "gemma3": ("image", "image, sampled"),
    "qwen2_vl (image)": ("image", "image, sampled", "positions"),
    "qwen3_vl (image)": ("image", "image, sampled"),
    "paligemma (image)": ("greedy", "padded", "image", "image, sampled"),
    "exaone4_5 (image)": ("padded", "window"),
    "llava (image)": ("image",),
    "idefics3 (image)": ("image",),
}
PAIRS = [(name, case) for name, own in QUICK.items() for case in dict.fromkeys((*EVERYWHERE, *own))]


@pytest.mark.parametrize(("name", "case"), PAIRS, ids=lambda value: value)
def test_text_is_that_of_plain_decoding(name, case):
    result = check(TinyType.parse(name), CASES[case])
    count_comparison()
    if result.outcome == "near tie" or result.detail == NOT_REPEATED:
        excuse(f"{name}, {case}: {result.detail}")
    elif result.outcome == "not applicable":
        pytest.skip(result.detail)
    else:
        assert result.outcome == "identical", f"{result.outcome}: {result.detail} ({result.mode})"
        assert result.accepted > 1 or result.mode == "plain", "no draft was accepted, so nothing was tested"


def test_types_are_written_as_they_are_read():
    assert [str(TinyType.parse(name)) for name in QUICK] == list(QUICK)
