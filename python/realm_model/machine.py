"""On what a model is trained and asked. It is no part of a run's configuration: another machine goes on."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from .ranks import TIMEOUT

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Machine:
    """device: of this rank. refresh_ranks: how many of the job's ranks, its last ones, embed documents in the
    place of training (builders.py). timeout: seconds that a rank waits for another before it counts as lost.
    """

    device: torch.device = CPU
    refresh_ranks: int = 0
    timeout: float = TIMEOUT


def use_threads(count: int) -> None:
    """Of torch. Raises ValueError for a number that cannot be."""
    if count < 1:
        raise ValueError(f"threads must be at least 1, got {count}")
    torch.set_num_threads(count)


def device_named(name: str) -> torch.device:
    """ "cpu"; "cuda", the GPU of this rank's place on its machine (torchrun's LOCAL_RANK), else the first;
    "auto", that GPU where torch sees one and the CPU otherwise. A GPU computes by repeatable() from then on.

    Raises ValueError for "cuda" where torch sees no GPU, or fewer than there are ranks.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return CPU
    if not torch.cuda.is_available():
        built = "none is visible" if torch.version.cuda else "this torch was built without CUDA"
        raise ValueError(f"device cuda needs a GPU, but {built}: choose cpu, or auto")
    place, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if place >= count:
        raise ValueError(f"device cuda needs a GPU for each rank of a machine, got {count} for rank {place}")
    repeatable()
    torch.cuda.set_device(place)
    return torch.device("cuda", place)


def repeatable() -> None:
    """Have torch sum in a fixed order on a GPU, so that a resumed run has the losses of an undisturbed one.

    Left to itself the backward of attention with a mask adds up as its blocks end. What has no such form
    warns, and goes on. To be called before the GPU is used.
    """
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # what torch asks for; read with the first product
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # that mode's own, of no use here
