"""Google's checkpoints: variables fabricated from models of the goldens give the same models again."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from realm_model.published import Embedder, KnowledgeAugmentedEncoder, OpenQA, Reader, Scorer

GOLDENS = Path(__file__).parent / "goldens" / "realm"
TIED = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")  # TensorFlow has no such variables


def variables(weights, bert, head):
    """Names and arrays as the TF code has them: scopes `bert` of BERT and its MLM head, `head` of the rest.

    Written from the names in the released code, not from the mapping under test.
    """
    out = {}
    for key, tensor in weights.items():
        if key.endswith(TIED) or key.endswith("position_ids"):
            continue
        if key.startswith("realm."):
            name = f"{bert}bert/" + key[len("realm.") :].replace(".", "/")
        elif key.startswith("cls.predictions."):
            name = f"{bert}cls/predictions/" + key[len("cls.predictions.") :].replace(".", "/")
        else:
            name = head + key.split(".", 1)[1].replace(".", "/")
        name = re.sub(r"layer/(\d+)", r"layer_\1", name)
        name = re.sub(r"(_embeddings)/weight$", r"\1", name)
        name = re.sub(r"((?:LayerNorm|layer_normalization)/)weight$", r"\1gamma", name)
        name = re.sub(r"((?:LayerNorm|layer_normalization)/)bias$", r"\1beta", name)
        name = re.sub(r"predictions/bias$", "predictions/output_bias", name)
        name = name.replace("dense_intermediate", "dense").replace("dense_output", "dense_1")
        if name.endswith("/weight"):
            name, tensor = name[: -len("weight")] + "kernel", tensor.T
        out[name] = tensor.clone().contiguous()
        out[name + "/adam_m"] = torch.zeros_like(out[name])
    out["global_step"] = torch.tensor(7)
    return out


def part(weights, prefix):
    return {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}


PRETRAINED = ("module/module/module/", "module/module/")
FINETUNED = ("module/module/module/module/", "module/module/module/")
READER = ("reader/module/", "reader/")


def cases():
    yield "embedder", Embedder, lambda w: variables(w, *PRETRAINED)
    yield "embedder", Embedder, lambda w: variables(w, *FINETUNED)
    yield "scorer", Scorer, lambda w: variables(part(w, "embedder."), *PRETRAINED)
    yield "encoder", KnowledgeAugmentedEncoder, lambda w: variables(w, "", "")
    yield "reader", Reader, lambda w: variables(w, *READER)
    yield (
        "openqa",
        OpenQA,
        lambda w: {
            **variables(part(w, "embedder."), *FINETUNED),
            **variables(part(w, "reader."), *READER),
            "block_emb": w["block_emb"],
        },
    )


@pytest.mark.parametrize(("name", "kind", "fabricate"), list(cases()))
def test_a_checkpoint_with_googles_names_is_the_same_model(tmp_path, name, kind, fabricate):
    model = kind.from_pretrained(GOLDENS / name)
    folder = tmp_path / name
    shutil.copytree(GOLDENS / name, folder)
    for path in folder.glob("*model.*"):
        path.unlink()
    save_file(fabricate(dict(model.state_dict())), folder / "model.safetensors")
    names = load_file(folder / "model.safetensors")
    assert any(n.endswith("LayerNorm/gamma") for n in names) and not any(n.endswith(".weight") for n in names)
    again = kind.from_pretrained(folder).state_dict()
    for key, value in model.state_dict().items():
        # The unused heads of embedder and reader get the tied decoder that TensorFlow had.
        if not key.endswith("decoder.weight"):
            assert torch.equal(again[key], value), key
    again_tied = again[next(key for key in again if key.endswith("decoder.weight"))]
    assert torch.equal(
        again_tied, again[next(key for key in again if key.endswith("word_embeddings.weight"))]
    )


def test_a_variable_that_is_not_realms_is_named(tmp_path):
    shutil.copytree(GOLDENS / "embedder", tmp_path / "embedder")
    path = tmp_path / "embedder" / "model.safetensors"
    save_file({"encoder/block/kernel": torch.zeros(1)}, path)
    with pytest.raises(
        ValueError, match=r"model\.safetensors: encoder/block/kernel is no variable of a REALM"
    ):
        Embedder.from_pretrained(path.parent)


def test_the_reader_of_an_open_qa_checkpoint_is_read_without_the_rest(tmp_path):
    model = OpenQA.from_pretrained(GOLDENS / "openqa")
    save_file(
        {
            **variables(dict(model.embedder.state_dict()), *FINETUNED),
            **variables(dict(model.reader.state_dict()), *READER),
        },
        tmp_path / "model.safetensors",
    )
    values = json.loads((GOLDENS / "openqa" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "architectures": ["RealmReader"]}))
    reader = Reader.from_pretrained(tmp_path)
    assert torch.equal(
        reader.qa_outputs.dense_intermediate.weight, model.reader.qa_outputs.dense_intermediate.weight
    )
