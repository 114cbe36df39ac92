"""Fixtures of the tests of features."""

import pytest

from fspad.trainer import feature_shards
from fspad.trainer import features as features_module
from fspad.trainer.features import compute_features


@pytest.fixture
def small_shards(monkeypatch):
    """A file of features for every few rows."""
    monkeypatch.setattr(feature_shards, "_SHARD_BYTES", 6000)
    monkeypatch.setattr(feature_shards, "_SHARD_SECONDS", 1e9)


@pytest.fixture
def computed(monkeypatch):
    """The number of rows of each batch that a target runs over."""
    batches = []

    def compute(target, input_ids, *args):
        batches.append(len(input_ids))
        return compute_features(target, input_ids, *args)

    monkeypatch.setattr(features_module, "compute_features", compute)
    return batches
