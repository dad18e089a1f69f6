"""No published file is trusted: what is missing, damaged or hostile is named in one line, never executed."""

import json
import os
import pickle
import shutil

import pytest
import torch

pytest.importorskip("transformers")

from realm_published_cases import CLASSES, QUESTIONS, REFERENCES, copy_of, load, weights_of

from realm_model.published.tokenizer import read_tokenizer


def refused(name, folder, *words):
    with pytest.raises(ValueError) as caught:
        CLASSES[name].from_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("way", ["torch.save", "pickle"])
def test_a_bin_that_wants_to_run_something_is_refused_and_does_not(tmp_path, way):
    folder, trace = copy_of("reader", tmp_path), tmp_path / "trace"
    if way == "pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Touch(trace)}, protocol=2))
    else:
        torch.save({"a": Touch(trace)}, folder / "pytorch_model.bin")
    refused("reader", folder, "pytorch_model.bin is refused", "tensors only")
    assert not trace.exists()


@pytest.mark.parametrize("name", ["encoder", "reader"])
def test_weights_cut_short_are_named(tmp_path, name):
    folder = copy_of(name, tmp_path)
    path = next(folder.glob("*model.*"))
    whole = path.read_bytes()
    for size in (0, 1, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(name, folder, path.name)


def test_weights_that_do_not_fit_are_named(tmp_path):
    folder = copy_of("reader", tmp_path)
    path = folder / "pytorch_model.bin"
    weights = weights_of(folder)
    lacking = {k: v for k, v in weights.items() if k != "qa_outputs.dense_output.weight"}
    torch.save(lacking, path)
    refused(
        "reader", folder, "pytorch_model.bin", "needs qa_outputs.dense_output.weight, which the file lacks"
    )
    torch.save({**weights, "pooler.weight": torch.zeros(1)}, path)
    refused("reader", folder, "pytorch_model.bin", "has no pooler.weight, which the file holds")
    torch.save({**weights, "qa_outputs.dense_output.weight": torch.zeros(1, 4)}, path)
    refused("reader", folder, "qa_outputs.dense_output.weight must be [1, 5] by config.json, got [1, 4]")
    torch.save({**weights, "step": 3}, path)
    refused("reader", folder, "must hold tensors by name, got a int at 'step'")
    torch.save([torch.zeros(1)], path)
    refused("reader", folder, "must hold tensors by name, got a list")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, '"model_type": "realm", got \'bert\''),
        ({"hidden_size": "wide"}, "hidden_size must be a positive integer, got 'wide'"),
        ({"hidden_size": 7}, "must be a multiple of num_attention_heads=2, got 7"),
        ({"layer_norm_eps": None}, "layer_norm_eps must be a number, got None"),
        ({"hidden_act": "swosh"}, "hidden_act must be an activation of transformers, got 'swosh'"),
        (
            {"num_block_records": 7},
            "block_emb must be [num_block_records=7, retriever_proj_size=6], got [6, 6]",
        ),
        ({"reader_beam_size": 7}, "reader_beam_size must be at most num_block_records=6, got 7"),
        ({"reader_seq_len": 25}, "reader_seq_len must be at most max_position_embeddings=24, got 25"),
        ({"vocab_size": 50}, "vocab.txt may hold 50 tokens by config.json, got 52"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_configuration_that_cannot_be_is_named(tmp_path, change, message):
    folder = copy_of("openqa", tmp_path)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **change}))
    refused("openqa", folder, str(folder), message)


def test_a_missing_file_is_named(tmp_path):
    refused("openqa", tmp_path / "nowhere", "nowhere is no checkpoint: cannot read config.json")
    for lost, message in [
        ("pytorch_model.bin", "it must hold model.safetensors or pytorch_model.bin"),
        ("block_records.npy", "block_records.npy"),
        ("vocab.txt", "must hold vocab.txt or tokenizer.json"),
    ]:
        folder = copy_of("openqa", tmp_path)
        (folder / lost).unlink()
        refused("openqa", folder, str(folder), message)
        shutil.rmtree(folder)


def test_a_tokenizer_json_that_is_none_is_named(tmp_path):
    folder = copy_of("openqa", tmp_path)
    (folder / "vocab.txt").unlink()
    (folder / "tokenizer.json").write_text("{}")
    refused("openqa", folder, "tokenizer.json is no tokenizer")


def test_a_vocabulary_that_is_not_berts_is_named(tmp_path):
    path = copy_of("openqa", tmp_path) / "vocab.txt"
    words = path.read_text().split()
    path.write_text("\n".join(words[1:] + words[:1]))
    refused("openqa", path.parent, "vocab.txt must hold [PAD] at 0, got 51")
    path.write_text("\n".join(word for word in words if word != "[SEP]"))
    refused("openqa", path.parent, "vocab.txt must hold", "lacks [SEP]")


def test_a_token_that_stands_twice_is_named(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\na\nthe\n")
    with pytest.raises(
        ValueError, match=r"words\.txt, line 8: a token may stand once, got 'the' as in line 6"
    ):
        read_tokenizer(path, 100)


def test_a_question_that_cannot_be_is_named():
    model = load("openqa")
    with pytest.raises(ValueError, match="a question may have 22 wordpieces, got 23"):
        model.answer(["who " * 23])
    with pytest.raises(ValueError, match="references must be one list for each of 3 questions, got 2"):
        model.loss(QUESTIONS, REFERENCES[:2])
    with pytest.raises(ValueError, match="references must not be empty"):
        model.loss(QUESTIONS[:1], [[" "]])
    with pytest.raises(ValueError, match="references lists of texts, got a text"):
        model.loss(QUESTIONS[:1], ["William Shakespeare"])
    with pytest.raises(ValueError, match="questions must be a list of texts, got one text"):
        model.answer("who was ann")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        model.answer(QUESTIONS, batch_size=0)
    assert model.answer([]) == []
