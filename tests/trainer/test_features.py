"""Features on disk: the same as computed in training, and never those of something else."""

import copy

import pytest
import torch
from datasets import Dataset, concatenate_datasets

from fspad import FSPADConfig, FSPADModel
from fspad.trainer import feature_shards
from fspad.trainer import features as features_module
from fspad.trainer.data import prepare_dataset
from fspad.trainer.feature_shards import describe_target
from fspad.trainer.features import add_features, compute_features
from helpers.models import make_target
from helpers.trainers import losses, make_dataset, make_trainer, shards

pytestmark = pytest.mark.usefixtures("small_shards")


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mixtral"])
def test_features_are_those_of_one_row_at_a_time(tmp_path, family, packing):
    target = make_target(family).train()
    prepared = prepare_dataset(make_dataset(40), None, max_length=30, packing=packing)
    stored = add_features(prepared, target, tmp_path, batch_size=4)
    assert len(shards(tmp_path)) > 2
    assert not target.training
    for row, expected in zip(stored, prepared, strict=True):
        features = row.pop("features")
        assert row == expected
        positions = torch.tensor([row["position_ids"]]) if packing else None
        alone = compute_features(target, torch.tensor([row["input_ids"]]), None, positions)[0]
        torch.testing.assert_close(features, alone, rtol=1e-5, atol=1e-5 * alone.abs().max().item())


def test_rows_of_about_one_length_are_computed_together(tmp_path, monkeypatch, computed):
    monkeypatch.setattr(feature_shards, "_SHARD_BYTES", 1 << 20)
    prepared = prepare_dataset(make_dataset(18), None)
    padding = []
    monkeypatch.setattr(
        features_module, "check_token_ids", lambda ids, _: padding.append((ids == 0).sum(dim=1).max().item())
    )
    add_features(prepared, make_target(), tmp_path, batch_size=4)
    assert computed == [4, 4, 4, 4, 2]
    # Lengths are 6 to 24: in their own order, some batch would pad a row by more.
    assert max(padding) < 8


@pytest.mark.parametrize(("dtype", "draft_vocab_size"), [(torch.float32, None), (torch.bfloat16, 40)])
def test_training_on_stored_features_is_the_same_training(tmp_path, dtype, draft_vocab_size):
    target = make_target().to(dtype)
    torch.manual_seed(1)
    head = FSPADModel.from_target(target, FSPADConfig.from_target(target.config, draft_vocab_size=draft_vocab_size))
    prepared = prepare_dataset(make_dataset(), None)
    stored = add_features(prepared, target, tmp_path / "features")
    assert stored[0]["features"].dtype == dtype
    results = []
    for dataset in (prepared, stored):
        trainer = make_trainer(tmp_path, target, dataset, copy.deepcopy(head).float(), feature_noise=0.0)
        trainer.train()
        results.append(losses(trainer))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(*results, strict=True):
        assert one == pytest.approx(other, abs=tolerance)


def test_stored_features_need_no_target_forward(tmp_path, monkeypatch):
    target = make_target()
    packed = prepare_dataset(make_dataset(), None, max_length=40, packing=True)
    stored = add_features(packed, target, tmp_path / "features")

    def forward(*args, **kwargs):
        raise AssertionError("the target ran")

    monkeypatch.setattr(target, "forward", forward)
    arguments = {"packing": True, "max_length": 40, "num_draft_steps": 2}
    make_trainer(tmp_path, target, stored, train_sampling_strategy="group_by_length", **arguments).train()


def test_datasets_with_features_are_put_together(tmp_path):
    target = make_target()
    parts = [prepare_dataset(make_dataset(rows), None) for rows in (3, 5)]
    stored = [add_features(part, target, tmp_path / str(len(part))) for part in parts]
    together = concatenate_datasets(stored)
    trainer, online = (
        make_trainer(tmp_path / "head", dataset=dataset, feature_noise=0.0)
        for dataset in (together, concatenate_datasets(parts))
    )
    trainer.train()
    online.train()
    torch.testing.assert_close(torch.tensor(losses(trainer)), torch.tensor(losses(online)), rtol=1e-4, atol=1e-5)
    trainer = make_trainer(tmp_path / "head", dataset=together.with_format("torch"))
    with pytest.raises(ValueError, match="expected tensors as features, got bytes as they are stored: do not set"):
        trainer.train()


def change_config(target):
    target.config.rope_parameters = {"rope_type": "default", "rope_theta": 5000.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda target: make_target(seed=1), r"weights '\w+', now '\w+'\)"),
        (lambda target: target.bfloat16(), "dtype 'float32', now 'bfloat16'; weights"),
        (lambda target: target.set_attn_implementation("eager"), r"\(attention 'sdpa', now 'eager'\)"),
        (change_config, r"\(config.rope_parameters {.*10000.0.*}, now {.*5000.0.*}\)"),
    ],
)
def test_features_of_another_target_are_refused(tmp_path, change, message):
    prepared, target = prepare_dataset(make_dataset(), None), make_target()
    add_features(prepared, target, tmp_path)
    files = set(tmp_path.iterdir())
    other = change(target) or target
    with pytest.raises(ValueError, match=f"{message}.*: name another folder, or remove this one"):
        add_features(prepared, other, tmp_path)
    assert set(tmp_path.iterdir()) == files


def test_names_of_other_targets_are_told(tmp_path):
    prepared, target, other = prepare_dataset(make_dataset(), None), make_target(), make_target(seed=1)
    target.config._name_or_path, other.config._name_or_path = "some/target", "another/target"
    add_features(prepared, target, tmp_path)
    with pytest.raises(ValueError, match="target 'some/target', now 'another/target'; weights"):
        add_features(prepared, other, tmp_path)


def test_features_of_another_dataset_are_refused(tmp_path):
    prepared, target = prepare_dataset(make_dataset(), None), make_target()
    add_features(prepared, target, tmp_path)
    other = prepared.select(range(3))
    with pytest.raises(ValueError, match=r"rows 16, now 3; tokens \d+, now \d+; dataset '\w+', now '\w+'"):
        add_features(other, target, tmp_path)
    # The same rows in another order
    with pytest.raises(ValueError, match=r"others \(dataset '\w+', now '\w+'\)"):
        add_features(prepared.select(range(15, -1, -1)), target, tmp_path)
    packed = prepare_dataset(prepared, None, max_length=40, packing=True)
    moved = packed.map(lambda row: {"position_ids": list(range(row["length"]))})
    add_features(packed, target, tmp_path / "packed")
    with pytest.raises(ValueError, match=r"others \(dataset '\w+', now '\w+'\)"):
        add_features(moved, target, tmp_path / "packed")


def test_features_of_the_same_are_used_again(tmp_path, computed):
    prepared, target = prepare_dataset(make_dataset(), None), make_target()
    first = add_features(prepared, target, tmp_path)
    (tmp_path / ".lock").unlink(missing_ok=True)
    files = set(tmp_path.iterdir())
    computed.clear()
    # Somewhere else, with other pads, and of a release of transformers that knows of one thing more
    target.config._name_or_path, target.config.pad_token_id, target.config.brand_new = "elsewhere", 5, True
    rows = Dataset.from_list(list(prepared))
    assert rows._fingerprint != prepared._fingerprint
    again = add_features(concatenate_datasets([rows.select(range(9)), rows.select(range(9, 16))]), target, tmp_path)
    assert computed == []
    assert set(tmp_path.iterdir()) == files, "a folder that can only be read will do"
    for one, other in zip(again, first, strict=True):
        assert torch.equal(one["features"], other["features"])


def test_adapters_are_part_of_the_target():
    peft = pytest.importorskip("peft")
    target = make_target()
    plain = describe_target(target)
    adapted = peft.get_peft_model(target, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    before = describe_target(adapted)
    assert (plain["adapters"], before["adapters"]) == ([], ["default"])
    assert before["weights"] != plain["weights"]
    with adapted.disable_adapter():
        assert describe_target(adapted)["adapters"] == []
    assert describe_target(adapted) == before
    with torch.no_grad():
        next(p for name, p in adapted.named_parameters() if "lora_B" in name)[0, 0] += 1e-3
    assert describe_target(adapted)["weights"] != before["weights"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool])
def test_sums_of_weights_are_exact_in_any_order(monkeypatch, dtype):
    weight = (torch.randn(50, 30) * 3).to(dtype)
    expected = feature_shards._sum_bits(weight)
    monkeypatch.setattr(feature_shards, "_ELEMENTS_AT_ONCE", 7)
    assert feature_shards._sum_bits(weight.T) == expected
    changed = weight.clone()
    changed[3, 4] = not weight[3, 4] if dtype == torch.bool else weight[3, 4] + 1
    assert feature_shards._sum_bits(changed) != expected
    assert feature_shards._sum_bits(weight.to("meta")) is None


def test_features_that_are_not_finite(tmp_path):
    prepared, target = prepare_dataset(make_dataset(40), None), make_target()
    with torch.no_grad():
        target.model.norm.weight.fill_(5e4)
    with pytest.raises(
        ValueError, match=r"in float16, got NaN or infinity at \d+ tokens .* load the target in bfloat16"
    ):
        add_features(prepared, copy.deepcopy(target).half(), tmp_path / "half")
    assert shards(tmp_path / "half") == []
    assert len(add_features(prepared, copy.deepcopy(target).bfloat16(), tmp_path / "half")) == 40
    # One row, in a shard after the first
    rows = make_dataset(40).map(lambda row, i: {"prompt_ids": [96 if i == 30 else 1, 2]}, with_indices=True)
    rows = rows.map(lambda row: {"response_ids": [token % 96 for token in row["response_ids"]]})
    with torch.no_grad():
        target.model.embed_tokens.weight[96] = torch.nan
    with pytest.raises(
        ValueError, match=r"in float32, got NaN or infinity at \d+ tokens of row 30 of the dataset; check"
    ):
        add_features(prepare_dataset(rows, None), target, tmp_path / "float")
    assert shards(tmp_path / "float")


def test_padding_may_be_anything(tmp_path, monkeypatch):
    def compute(target, input_ids, attention_mask):
        features = compute_features(target, input_ids, attention_mask)
        return features.masked_fill(attention_mask[..., None] == 0, torch.inf)

    monkeypatch.setattr(features_module, "compute_features", compute)
    rows = [{"prompt_ids": [1] * n, "response_ids": [2] * n} for n in (2, 9)]
    stored = add_features(prepare_dataset(Dataset.from_list(rows), None), make_target(), tmp_path)
    assert [len(row["features"]) for row in stored] == [4, 18]
    assert all(torch.isfinite(row["features"]).all() for row in stored)


def test_datasets_that_have_no_place_on_disk(tmp_path):
    target, prepared = make_target(), prepare_dataset(make_dataset(), None)
    for dataset, message in (
        (prepared.to_iterable_dataset(), "got a stream; load it without `streaming=True`"),
        (make_dataset(), "got prompt_ids, response_ids; call `prepare_dataset` first"),
        (prepared.select([]), "expected rows to compute features of, got none"),
        (add_features(prepared, target, tmp_path / "once"), "got a column `features`"),
        (Dataset.from_list([{"input_ids": [1, 2, 99]}]), "token ids below 97, the target's vocabulary size, got 99"),
    ):
        with pytest.raises(ValueError, match=message):
            add_features(dataset, target, tmp_path / "twice")
