"""A model on another device than its corpus, without one: every tensor is where the op that takes it runs.

The device is torch's "meta", whose tensors here hold their values; an op that is given tensors of both places
fails, as on a GPU. What is not shown is a GPU's kernels and its numbers.
"""

import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

pytest.importorskip("transformers")

import realm_kernels as rk
from realm_model import answer as answer_module
from realm_model.config import ModelConfig, RealmConfig, RunConfig, preset
from realm_model.evaluate import build_table, evaluate
from realm_model.inputs import prepare, trivial, world_tokenizer
from realm_model.machine import device_named
from realm_model.masking import crop_spans, mask_statements
from realm_model.model import Realm
from realm_model.objectives import ict_loss, reading_loss, realm_loss
from realm_model.pretrain import Setting
from realm_model.world import draw_world, generate_source

META = torch.device("meta")
# CUDA takes indices that are on the CPU.
TAKE_BOTH = {torch.ops.aten._to_copy.default, torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default}


class There(torch.Tensor):
    """A tensor on META that holds its values."""

    @staticmethod
    def __new__(cls, held):
        there = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=META
        )
        there.held = held
        return there

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class TwoPlaces(TorchDispatchMode):
    """Every op of a block by run(), those that make a tensor on META from nothing too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """The op on the values of its tensors, which must be in one place, as its result then is."""
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    theirs = [isinstance(tensor, There) for tensor in tensors]
    if any(theirs) and func not in TAKE_BOTH:
        host = [tensor for tensor in tensors if not isinstance(tensor, There) and tensor.dim()]
        assert not host, f"{func} is given a tensor of the host"
    place = kwargs.get("device") or (META if any(theirs) else torch.device("cpu"))
    kwargs = kwargs | {"device": torch.device("cpu")} if "device" in kwargs else kwargs
    out = func(*held(args), **held(kwargs))
    return there(out) if place == META else out


def held(values):
    return tree_map(lambda v: v.held if isinstance(v, There) else v, values)


def there(values):
    return tree_map(
        lambda v: There(v) if isinstance(v, torch.Tensor) and not isinstance(v, There) else v, values
    )


def on_device(op):
    """The op, which refuses tensors of the host as its checks do on a GPU."""

    def call(*args, **kwargs):
        tensors = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, torch.Tensor)]
        assert all(isinstance(tensor, There) for tensor in tensors), f"{op.__name__} is given the host's"
        args = [v.table if isinstance(v, Table) else v for v in args]
        return there(op(*held(args), **held(kwargs)))

    return call


class Table:
    def __init__(self, shards):
        assert all(isinstance(shard, There) for shard in shards)
        self.table, self.num_rows = REAL_TABLE.from_tensors(held(shards)), len(shards[0])


REAL_TABLE = rk.ShardedTable
MODEL = ModelConfig(vocab_size=400, hidden=16, layers=1, projection=8)
CONFIG = RealmConfig(candidates=4)


@pytest.fixture
def setting(monkeypatch):
    config = RunConfig(world=preset("tiny").world, model=MODEL, marginal=CONFIG)
    world = draw_world(generate_source(), config.world, 0)
    tokenizer = world_tokenizer(world, MODEL.vocab_size)
    for name in ("mips_topk", "linear_marginal_loss", "posterior"):
        monkeypatch.setattr(rk, name, on_device(getattr(rk, name)))
    monkeypatch.setattr(torch, "autocast", lambda device, enabled: nullcontext())  # "meta" has none
    monkeypatch.setattr(rk, "ShardedTable", SimpleNamespace(from_tensors=Table))
    with TwoPlaces(), torch.no_grad():
        yield Setting(config, tokenizer, prepare(world, tokenizer, MODEL))


@pytest.fixture
def model(setting):
    realm = Realm(MODEL, setting.tokenizer.get_vocab_size())
    for module in realm.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(There(parameter.data), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, There(buffer))
    assert realm.device == META
    return realm


def test_what_is_on_two_devices_fails_here_too():
    with TwoPlaces(), pytest.raises(AssertionError, match="is given a tensor of the host"):
        There(torch.ones(3)) + torch.ones(3)
    with TwoPlaces():
        assert (There(torch.ones(3)) + torch.ones(3).to(META)).cpu().tolist() == [2.0] * 3


def test_every_stage_has_its_loss_where_the_model_is(setting, model):
    corpus, generator = setting.corpus, torch.Generator().manual_seed(0)
    rows = torch.arange(6)
    spans, rest = crop_spans(corpus.documents.read(rows), 0.9, generator)
    losses = [ict_loss(model, corpus.documents, rows, spans[:, None], rest)]
    statements = corpus.own[rows]
    masked = mask_statements(statements, "salient", generator)
    losses.append(reading_loss(model, *masked, corpus.documents.read(rows)))
    table, exclude = build_table(model, corpus.documents), trivial(corpus.documents, statements)
    losses.append(realm_loss(model, corpus.documents, table, masked, exclude, CONFIG)[0])
    assert all(isinstance(loss, There) and loss.item() > 0 for loss in losses)


def test_a_model_elsewhere_is_evaluated_and_asked(setting, model):
    result = evaluate(model, setting.corpus, CONFIG, setting.corpus.held_out[torch.arange(8)])
    assert 0 <= result.recall[5] <= 1 and result.log_marginal < 0
    table = build_table(model, setting.corpus.documents)
    answer = answer_module.answer(setting, model, table, "the [MASK]")
    assert len(answer.candidates) == CONFIG.candidates


@pytest.mark.parametrize(
    ("name", "seen", "place"), [("auto", 0, None), ("cpu", 2, None), ("auto", 2, 1), ("cuda", 2, 1)]
)
def test_a_device_is_chosen_by_one_rule(monkeypatch, name, seen, place):
    chosen = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    expected = torch.device("cpu") if place is None else torch.device("cuda", place)
    assert device_named(name) == expected and chosen == ([] if place is None else [place])


def test_a_gpu_computes_the_same_twice_and_the_cpu_is_left_alone(monkeypatch):
    """Or a resumed run would have other losses: attention's backward is not repeatable by default."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # to be as it was afterwards
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda place: None)
    torch.use_deterministic_algorithms(False)
    device_named("cpu")
    assert not torch.are_deterministic_algorithms_enabled()
    device_named("cuda")
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize(
    ("name", "seen", "message"),
    [("cuda", 0, "^device cuda needs a GPU, but"), ("cuda", 1, "got 1 for rank 1"), ("tpu", 0, "got 'tpu'")],
)
def test_a_device_that_is_not_there_is_refused(monkeypatch, name, seen, message):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    with pytest.raises(ValueError, match=message):
        device_named(name)
