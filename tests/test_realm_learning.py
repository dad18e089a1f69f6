"""Retrieval is learned without labels, from masked tokens alone, on subjects not asked about in training."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("transformers")

from realm_model.config import preset
from realm_model.pretrain import pretrain


def test_realm_learns_to_retrieve(tmp_path):
    pretrain(replace(preset("tiny"), threads=1), tmp_path, lambda record: None)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    last = {record["stage"]: record["evaluation"] for record in records if "evaluation" in record}
    start, end = last["reader"], last["realm"]
    # The warm start finds the subject; which of its documents answers is REALM's to learn.
    assert start["recall@1"] < 0.5
    assert end["recall@1"] > start["recall@1"] + 0.25
    assert end["recall@5"] > 0.9
    assert end["utility"] > 1.0
    assert end["accuracy"] > start["accuracy"] + 0.25
