"""Heads that are saved and loaded again, and checkpoints that are refused."""

import pytest
import torch
from transformers import AutoModel

from fspad import FSPADConfig, FSPADModel
from helpers.models import make_target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", [(True, True), (True, False), (False, True), (False, False)])
def test_save_and_load(tmp_path, variant, dtype):
    feature_sampling, partial_alignment = variant
    target = make_target().to(dtype)
    config = FSPADConfig.from_target(
        target.config, feature_sampling=feature_sampling, partial_alignment=partial_alignment, draft_vocab_size=9
    )
    head = FSPADModel.from_target(target, config)
    assert head.dtype == dtype
    head.set_draft_vocabulary(torch.tensor([5, 1, 2, 3, 4, 6, 7, 8, 96]))
    head.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is FSPADModel
    assert loaded.dtype == dtype
    assert loaded.config.feature_sampling == feature_sampling
    state_dict = head.state_dict()
    assert not any("embed_tokens" in name or "lm_head" in name for name in state_dict)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state_dict[name]), name


def test_a_lowered_draft_vocabulary_is_what_gets_saved(tmp_path):
    target = make_target()
    head = FSPADModel.from_target(target, FSPADConfig.from_target(target.config, draft_vocab_size=9))
    head.config.draft_vocab_size = 4
    head.save_pretrained(tmp_path / "four")
    assert AutoModel.from_pretrained(tmp_path / "four").active_draft_vocab_ids.tolist() == [0, 1, 2, 3]
    head.config.draft_vocab_size = None
    head.save_pretrained(tmp_path / "all")
    assert AutoModel.from_pretrained(tmp_path / "all").active_draft_vocab_ids is None


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [([1, 1, 2], "2 of them distinct"), ([0, 97], "from 0 to 97"), ([-1, 3], "from -1 to 3")],
)
def test_bad_draft_vocabularies_are_refused(token_ids, message):
    head = FSPADModel.from_target(make_target())
    with pytest.raises(ValueError, match=message):
        head.set_draft_vocabulary(torch.tensor(token_ids))


def test_missing_and_truncated_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    head = FSPADModel.from_target(make_target())
    head.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()

    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Exception, match=r"(?i)incomplete|safetensor"):
        FSPADModel.from_pretrained(tmp_path)

    file.write_bytes(whole)
    weights = load_file(file)
    del weights["layer.mlp.down_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing weights \['layer\.mlp\.down_proj\.weight'\]"):
        FSPADModel.from_pretrained(tmp_path)

    weights = load_file(file)
    weights["layer.mlp.down_proj.weight"] = head.layer.mlp.down_proj.weight.detach()
    weights["lm_head.weight"] = torch.zeros(3, 3)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"unknown weights \['lm_head\.weight'\]"):
        FSPADModel.from_pretrained(tmp_path)

    file.unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        FSPADModel.from_pretrained(tmp_path)


def test_a_draft_vocabulary_can_be_turned_off_while_loading(tmp_path):
    target = make_target()
    FSPADModel.from_target(target, FSPADConfig.from_target(target.config, draft_vocab_size=9)).save_pretrained(
        tmp_path
    )
    assert FSPADModel.from_pretrained(tmp_path, draft_vocab_size=None).active_draft_vocab_ids is None


def test_new_heads_have_the_frequencies_that_they_are_loaded_with(tmp_path):
    target = make_target().to(torch.bfloat16)
    head = FSPADModel.from_target(target)
    assert {parameter.dtype for parameter in head.parameters()} == {torch.bfloat16}
    head.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = FSPADModel.from_pretrained(tmp_path, dtype=dtype)
        assert torch.equal(loaded.rotary_emb.inv_freq, head.rotary_emb.inv_freq)
    assert torch.equal(head.float().rotary_emb.inv_freq, FSPADModel(head.config).rotary_emb.inv_freq)
