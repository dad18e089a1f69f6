"""Every damage of a table directory, each named with its file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from . import manifest, shard_file


def verify(path: str | os.PathLike[str], seen: Callable[[int], object] = lambda count: None) -> list[str]:
    """What is wrong with the table at `path`, a line for each damaged or missing file.

    Reads every byte: the manifest against its own checksum, each shard against the manifest's. `seen` is told
    of bytes as they are read. Raises FileNotFoundError where there is no table.
    """
    directory = Path(path)
    try:
        current, hold = manifest.read_and_hold(directory)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        return [str(error)]
    problems = []
    for shard in current.shards:
        try:
            with shard_file.opened(directory, shard, current.dim, current.dtype) as (descriptor, _):
                shard_file.check_content(descriptor, directory / shard.file, shard, seen)
            if shard.holds_ids:
                shard_file.read_ids(directory, shard, current.dim, current.dtype)
        except (OSError, ValueError) as error:
            problems.append(str(error))
    del hold  # until here the files of this version stayed where they are
    return problems
