"""Without a GPU Triton kernels run in Triton's interpreter; that must be decided before any is imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from realm_kernels.testing import poisoned_memory  # noqa: E402


@pytest.fixture(autouse=True)
def poison():
    """Every test runs with fresh memory filled with NaN, so that nothing unwritten passes for a result."""
    with poisoned_memory():
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
