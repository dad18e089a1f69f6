"""Without a GPU Triton kernels run in Triton's interpreter; that must be decided before any is imported."""

import os
import signal

import interpreted
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from realm_kernels.testing import poisoned_memory  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--share", default="0/1", help="i/n: each n-th test, from the i-th on")
    parser.addoption("--embeddings", help="folder of a table whose rows a GPU search is compared on")


def pytest_configure(config):
    interpreted.watch()
    # A shell's background job ignores Ctrl-C, and what it starts would too; some tests press it.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def note_launches(request):
    interpreted.begin(request.node)


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.name == "test_triton_interpreter.py")  # over what all others launch
    share, of = map(int, config.getoption("--share").split("/"))
    if of > 1:
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % of != share])
        items[:] = items[share::of]


@pytest.fixture(autouse=True)
def poison():
    """Every test runs with fresh memory filled with NaN, so that nothing unwritten passes for a result."""
    with poisoned_memory():
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
