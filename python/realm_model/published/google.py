"""The names of Google's own checkpoints (language/realm, language/orqa), which TensorFlow wrote.

Weights are known by their slashes. TensorFlow itself is not needed here: whoever has it writes a checkpoint's
variables, as they are, into a model.safetensors beside config.json and vocab.txt:

    reader = tf.train.load_checkpoint(path)
    names = reader.get_variable_to_shape_map()
    safetensors.numpy.save_file({name: reader.get_tensor(name) for name in names}, "model.safetensors")

for OpenQA those of the embedder, of the reader and `block_emb` in one file.
"""

from __future__ import annotations

import re

from torch import Tensor

# Of the optimizer, and the next-sentence head that BERT's own checkpoints carry along.
_NOT_WEIGHTS = re.compile(
    r"(^|/)(adam_[mv]|AdamWeightDecayOptimizer(_1)?|global_step)($|/)|^cls/seq_relationship/"
)

# What a name begins with, the part it belongs to, and what it begins with there. Fine-tuning wraps the
# embedder in one module more.
_PARTS = (
    (re.compile(r"^(?:module/){3,4}bert/"), "embedder", "realm/"),
    (re.compile(r"^(?:module/){3,4}cls/predictions/"), "embedder", "cls/predictions/"),
    (re.compile(r"^(?:module/){2,3}(?=(?:dense|LayerNorm)/)"), "embedder", "cls/"),
    (re.compile(r"^reader/module/bert/"), "reader", "realm/"),
    (re.compile(r"^reader/module/cls/"), "reader", "cls/"),
    (re.compile(r"^reader/dense/"), "reader", "qa_outputs/dense_intermediate/"),
    (re.compile(r"^reader/dense_1/"), "reader", "qa_outputs/dense_output/"),
    (re.compile(r"^reader/layer_normalization/"), "reader", "qa_outputs/layer_normalization/"),
    (re.compile(r"^bert/"), "encoder", "realm/"),
    (re.compile(r"^cls/"), "encoder", "cls/"),
)
# Where a class of the layout keeps its parts.
_PREFIXES = {
    "RealmEmbedder": {"embedder": ""},
    "RealmScorer": {"embedder": "embedder."},
    "RealmKnowledgeAugEncoder": {"encoder": ""},
    "RealmReader": {"reader": ""},
    "RealmForOpenQA": {"embedder": "embedder.", "reader": "reader."},
}
_LAST = {"kernel": "weight", "gamma": "weight", "output_bias": "bias", "beta": "bias"}
_WORDS, _DECODER = "realm.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"


def is_google(weights: dict[str, Tensor]) -> bool:
    return any("/" in name for name in weights)


def from_google(weights: dict[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """Weights by the keys of the layout, kernels transposed. Parts that the class has not are left out.

    The decoder of the MLM head, which TensorFlow's graph shares with the word embeddings, gets its key.
    Raises ValueError for a name that is none of REALM's.
    """
    prefixes = _PREFIXES[architecture]
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name == "block_emb":
            found[name] = tensor
            continue
        if _NOT_WEIGHTS.search(name):
            continue
        part, key = _key(name)
        if part not in prefixes:
            continue
        found[prefixes[part] + key] = tensor.T.contiguous() if name.endswith("/kernel") else tensor
    for prefix in prefixes.values():
        if prefix + _WORDS in found:
            found[prefix + _DECODER] = found[prefix + _WORDS]
    return found


def _key(name: str) -> tuple[str, str]:
    """The part a variable belongs to, and its key there."""
    for beginning, part, instead in _PARTS:
        inner, matched = beginning.subn(instead, name)
        if matched:
            *path, last = re.sub(r"/layer_(\d+)/", r"/layer/\1/", inner).split("/")
            # Embeddings are variables of their own, without a kernel.
            path.append(f"{last}.weight" if last.endswith("_embeddings") else _LAST.get(last, last))
            return part, ".".join(path)
    raise ValueError(f"{name} is no variable of a REALM checkpoint")
