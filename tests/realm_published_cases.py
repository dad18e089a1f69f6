"""What the tests of the published checkpoints share: the goldens, and an output of each class to compare."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from realm_model.published import Embedder, KnowledgeAugmentedEncoder, OpenQA, Reader, Scorer

GOLDENS = Path(__file__).parent / "goldens" / "realm"
PORT = load_file(GOLDENS / "outputs.safetensors")
CASES = json.loads((GOLDENS / "openqa.json").read_text())["cases"]
QUESTIONS = [case["question"] for case in CASES]
REFERENCES = [case["references"] for case in CASES]
CLASSES = {
    "embedder": Embedder,
    "scorer": Scorer,
    "encoder": KnowledgeAugmentedEncoder,
    "reader": Reader,
    "openqa": OpenQA,
}
TOLERANCE = dict(rtol=0, atol=1e-5)


def port(name, *keys):
    values = [PORT[f"{name}/{key}"] for key in keys]
    return values[0] if len(values) == 1 else values


def embed(model):
    return model(*port("embedder", "ids", "segments"))


def score(model):
    return model(*port("scorer", "ids", "documents", "segments", "document_segments"))


def logits(model):
    ids, segments = port("encoder", "ids", "segments")
    positions = torch.tensor([[2, 4], [3, 0]])
    return F.linear(model(ids, segments, positions), model.weight, model.bias)


def span_scores(model):
    read = model(*port("reader", "ids", "segments", "body"))
    return read.scores.masked_fill(~read.valid, 0.0)


def losses(model):
    return torch.cat(list(model.train().loss(QUESTIONS, REFERENCES).terms))


# A tensor of each model, to be compared before and after a trip through files.
OUTPUT = {"embedder": embed, "scorer": score, "encoder": logits, "reader": span_scores, "openqa": losses}


def load(name):
    return CLASSES[name].from_pretrained(GOLDENS / name)


def weights_of(folder):
    path = folder / "pytorch_model.bin"
    return torch.load(path, weights_only=True) if path.exists() else load_file(folder / "model.safetensors")


def copy_of(name, parent):
    """A golden folder that a test may damage."""
    return Path(shutil.copytree(GOLDENS / name, parent / name))
