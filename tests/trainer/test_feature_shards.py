"""Files of features: written as a whole or not at all, whatever interrupts it, and by one process at a time."""

import errno
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from fspad.trainer import feature_shards
from fspad.trainer import features as features_module
from fspad.trainer.data import prepare_dataset
from fspad.trainer.features import add_features, compute_features
from helpers.models import make_target
from helpers.trainers import make_dataset, shards

pytestmark = pytest.mark.usefixtures("small_shards")


@pytest.mark.parametrize("at", ["fsync", "replace", "compute"])
def test_interrupted_runs_go_on(tmp_path, monkeypatch, computed, at):
    target, prepared = make_target(), prepare_dataset(make_dataset(40), None)
    whole = add_features(prepared, target, tmp_path / "whole")
    number = len(shards(tmp_path / "whole"))
    assert number > 4
    owner, name = {
        "fsync": (os, "fsync"),
        "replace": (Path, "replace"),
        "compute": (features_module, "check_finite"),
    }[at]
    stock, calls = getattr(owner, name), []

    def interrupt(*args):
        calls.append(args)
        # Not an error, so that nothing is tidied up, as after a kill. `features.json` is replaced, too.
        if len(calls) == (6 if at == "compute" else 3):
            raise KeyboardInterrupt
        return stock(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            add_features(prepared, target, tmp_path / "parts", batch_size=2)
    kept = {path: path.stat().st_mtime_ns for path in shards(tmp_path / "parts")}
    assert 0 < len(kept) < number
    assert len(list((tmp_path / "parts").glob("*.part"))) == (at != "compute")
    kept_rows = sum(len(Dataset.from_file(str(path))) for path in kept)
    computed.clear()
    resumed = add_features(prepared, target, tmp_path / "parts")
    assert sum(computed) == 40 - kept_rows
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not list((tmp_path / "parts").glob("*.part"))
    assert len(resumed) == 40
    for one, other in zip(resumed, whole, strict=True):
        torch.testing.assert_close(one["features"], other["features"], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk(tmp_path, computed, monkeypatch):
    target, prepared = make_target(), prepare_dataset(make_dataset(40), None)
    monkeypatch.setattr(feature_shards, "_FIRST_ROWS", 2)
    stock = feature_shards._write_shard

    def write_third_to_a_full_disk(path, features):
        if len(shards(tmp_path)) == 2:
            path.with_name(path.name + ".part").symlink_to("/dev/full")
        stock(path, features)

    with monkeypatch.context() as patch:
        patch.setattr(feature_shards, "_write_shard", write_third_to_a_full_disk)
        with pytest.raises(OSError, match=r"features-.* \(No space left on device\).* kept: make room, and run"):
            add_features(prepared, target, tmp_path)
    assert len(shards(tmp_path)) == 2
    assert not list(tmp_path.glob("*.part")), "the room that it took is free again"
    kept = sum(len(Dataset.from_file(str(path))) for path in shards(tmp_path))
    computed.clear()
    resumed = add_features(prepared, target, tmp_path)
    assert sum(computed) == 40 - kept
    expected = compute_features(target, torch.tensor([prepared[39]["input_ids"]]))[0]
    torch.testing.assert_close(resumed[39]["features"], expected, rtol=1e-5, atol=1e-5)


def test_little_is_lost_on_a_slow_machine(tmp_path, monkeypatch):
    """However large a shard may be, it is written after some time."""
    monkeypatch.setattr(feature_shards, "_SHARD_BYTES", 1 << 30)
    monkeypatch.setattr(feature_shards, "_SHARD_SECONDS", 10.0)
    clock = iter(range(0, 100_000, 4))  # each shard takes four seconds, whatever is in it
    monkeypatch.setattr(feature_shards.time, "perf_counter", lambda: float(next(clock)))
    rows = [{"prompt_ids": [1, 2], "response_ids": [3, 4, 5]}] * 100
    add_features(prepare_dataset(Dataset.from_list(rows), None), make_target(), tmp_path)
    # Sixteen rows in four seconds, so that 40 rows take ten, and so on
    assert [len(Dataset.from_file(str(path))) for path in shards(tmp_path)] == [16, 40, 44]


def test_shard_that_was_removed_is_computed_again(tmp_path, computed):
    target, prepared = make_target(), prepare_dataset(make_dataset(40), None)
    whole = list(add_features(prepared, target, tmp_path))
    path = shards(tmp_path)[2]
    removed = len(Dataset.from_file(str(path)))
    path.unlink()
    computed.clear()
    again = add_features(prepared, target, tmp_path)
    assert sum(computed) == removed
    for one, other in zip(again, whole, strict=True):
        torch.testing.assert_close(one["features"], other["features"], rtol=1e-5, atol=1e-5)


def test_writer_without_room(tmp_path, monkeypatch):
    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target, prepared = make_target(), prepare_dataset(make_dataset(), None)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left on device"):
            add_features(prepared, target, tmp_path)
    assert shards(tmp_path) == []
    assert len(add_features(prepared, target, tmp_path)) == 16


def test_room_that_is_missing_is_told_beforehand(tmp_path, monkeypatch, caplog):
    import logging
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    add_features(prepare_dataset(make_dataset(40), None), make_target(), tmp_path)
    assert "need 0.0 GB more in" in caplog.text


def test_damaged_shards_are_told(tmp_path):
    prepared, target = prepare_dataset(make_dataset(40), None), make_target()
    first = add_features(prepared, target, tmp_path)[0]["features"]
    path = shards(tmp_path)[0]
    data, other = path.read_bytes(), shards(tmp_path)[-1].read_bytes()
    path.unlink()
    for damage in (data[:1000], data[:-1000], b"", b"no features at all", other):
        # Another file: the one before may still be mapped.
        path.unlink(missing_ok=True)
        path.write_bytes(damage)
        with pytest.raises(
            ValueError, match=rf"expected \d+ rows of \d+ bytes in {path}, got .*; remove this file to"
        ):
            add_features(prepared, target, tmp_path)
    path.unlink()
    torch.testing.assert_close(add_features(prepared, target, tmp_path)[0]["features"], first)
    (tmp_path / "features.json").unlink()
    with pytest.raises(ValueError, match=r"expected .*features.json, which says .* name another folder"):
        add_features(prepared, target, tmp_path)


def test_settings_can_be_read_by_people(tmp_path):
    target = make_target().bfloat16()
    target.config._name_or_path, target.config._commit_hash = "some/target", "abc"
    add_features(prepare_dataset(make_dataset(), None), target, tmp_path)
    settings = json.loads((tmp_path / "features.json").read_text())
    assert {name: settings[name] for name in ("target", "revision", "dtype", "attention", "hidden_size", "rows")} == {
        "target": "some/target",
        "revision": "abc",
        "dtype": "bfloat16",
        "attention": "sdpa",
        "hidden_size": 32,
        "rows": 16,
    }


def test_two_at_once_compute_each_row_once(tmp_path, computed):
    prepared, target = prepare_dataset(make_dataset(40), None), make_target()
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(add_features(prepared, target, tmp_path))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(stored) for stored in results] == [40, 40]
    assert sum(computed) == 40
