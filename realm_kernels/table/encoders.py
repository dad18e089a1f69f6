"""Where a TableRefresher's encode may run beside the trainer's own process: another one, or other ranks.

Each is called as a plain encode is, with a snapshot, and yields row chunks; so attempts, checks, commits and
counts are the same for all three.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ranks import LostRankError
from ..validation import FLOAT_DTYPES, check_tensor, describe
from .shard_file import raw_bytes
from .writer import check_count

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from torch.distributed import ProcessGroup

Encode = Callable[[Any], Iterable[Tensor]]


class Encoder:
    """An encode with something to give back: interrupt() ends a call under way, close() all of it.

    lost: why no later call can succeed; None as long as one may.
    """

    lost: str | None = None

    def __call__(self, snapshot: Any) -> Iterator[Tensor]:
        raise NotImplementedError

    def interrupt(self) -> None:
        """From any thread: the call under way, if there is one, need not go on."""

    def close(self) -> None:
        """No call is under way, and none will come."""


class ProcessEncoder(Encoder):
    """Run `encode` in a process of its own: it shares no interpreter lock with the trainer, and may crash.

    encode: as TableRefresher takes it, and importable from the process, as a function at the top of a module,
        a functools.partial or an object of such a class is. A fresh process begins there, with nothing of the
        trainer's memory, so a script that trains needs `if __name__ == "__main__":`. It encodes without
        gradients, and torch's random state is its own.
    threads: of torch there. On a CPU the trainer's and these together should be the cores.
    timeout: seconds to wait for a chunk before the process is given up; None waits for ever.

    The process starts with the first call and stays for the next ones. One that dies or hangs is an error of
    that call, which the refresher counts; the next call starts a new one. Snapshots, of tensors, numbers,
    strings, lists and dictionaries of them, and chunks travel through a pipe, on the CPU.

    >>> encoder = rk.table.ProcessEncoder(encode, threads=1)                          # doctest: +SKIP
    >>> refresher = rk.TableRefresher(table, encoder, mode="async", every=500)        # doctest: +SKIP
    """

    def __init__(self, encode: Encode, *, threads: int = 1, timeout: float | None = None) -> None:
        op = type(self).__name__
        if not callable(encode):
            raise TypeError(f"{op}: encode must be a function of a snapshot, got {describe(encode)}")
        check_count(op, "threads", threads)
        check_timeout(op, timeout)
        self.encode, self.threads, self.timeout = encode, threads, timeout
        self._process: Any = None
        self._connection: Connection | None = None
        self._lock = threading.Lock()  # of the two above: interrupt() comes from another thread

    def __call__(self, snapshot: Any) -> Iterator[Tensor]:
        connection = self._started()
        whole = False
        try:
            connection.send_bytes(_to_bytes(snapshot))
            while True:
                message = self._received(connection)
                whole = "shape" not in message
                if "error" in message:
                    raise RuntimeError(f"encode failed in its process: {message['error']}")
                if whole:
                    return
                chunk = torch.empty(message["shape"], dtype=FLOAT_DTYPES[message["dtype"]])
                if chunk.numel() > 0:
                    connection.recv_bytes_into(raw_bytes(chunk))
                yield chunk
        except (EOFError, OSError):
            raise RuntimeError(f"the process of encode died, {self._exit()}") from None
        finally:
            if not whole:  # what it would still send belongs to this call
                self.interrupt()

    def interrupt(self) -> None:
        with self._lock:
            process, self._process = self._process, None
            self._connection = None
        if process is not None:
            process.kill()
            process.join()

    def close(self) -> None:
        self.interrupt()

    def _started(self) -> Connection:
        with self._lock:
            if self._process is None or not self._process.is_alive():
                context = multiprocessing.get_context("forkserver")
                self._connection, theirs = context.Pipe()
                # A daemon: it ends with the trainer, however that ends.
                self._process = context.Process(
                    target=_serve_pipe,
                    args=(theirs, self.encode, self.threads),
                    name="table-refresh",
                    daemon=True,
                )
                self._process.start()
                theirs.close()
            assert self._connection is not None
            return self._connection

    def _received(self, connection: Connection) -> dict[str, Any]:
        if self.timeout is not None and not connection.poll(self.timeout):
            raise RuntimeError(f"the process of encode sent no chunk in {self.timeout:g} seconds: it hangs")
        message: dict[str, Any] = json.loads(connection.recv_bytes())
        return message

    def _exit(self) -> str:
        process = self._process
        if process is None:
            return "ended by the refresher"
        process.join(1)
        return f"exit code {process.exitcode}"


class RanksEncoder(Encoder):
    """Let other ranks of the job encode: each yields a part of the rows, in the order of the ranks.

    group: a gloo group for this alone, of this process, its rank 0, and of the ranks that encode, which call
        serve_encoder(encode, group) with an encode of their own part. Its timeout is how long they wait for
        each other: longer than the time between two refreshes, unless serve_encoder is given one.
    timeout: seconds to wait for a chunk, or for a snapshot to be taken, before a rank counts as lost; None is
        the group's.

    A rank that fails is an error of that call; one that is lost is a LostRankError of every later call, and
    the table stays as it is: `lost` then says why, for a trainer that will not go on so. Snapshots may hold
    tensors, numbers, strings, lists and dictionaries of them.

    >>> group = torch.distributed.new_group([0, 2, 3], backend="gloo")                # doctest: +SKIP
    >>> refresher = rk.TableRefresher(table, rk.table.RanksEncoder(group), ...)       # doctest: +SKIP
    """

    def __init__(self, group: ProcessGroup, *, timeout: float | None = None) -> None:
        check_timeout(type(self).__name__, timeout)
        self._peers = Peers(type(self).__name__, group, timeout)
        if self._peers.rank != 0:
            raise ValueError(
                f"{type(self).__name__}: group must have this process as its rank 0, got {self._peers.rank}"
            )
        self._closed = False

    def __call__(self, snapshot: Any) -> Iterator[Tensor]:
        if self.lost is not None:
            raise LostRankError(self.lost)
        waiting = list(range(1, self._peers.size))
        errors: list[str] = []
        try:
            message = _as_tensor(_to_bytes(snapshot))
            for rank in waiting:
                self._peers.send(rank, [_SNAPSHOT, message.numel(), 0, 0], message)
            while waiting:
                kind, chunk = self._peers.receive(waiting[0])
                if kind == _CHUNK:
                    yield chunk
                    continue
                if kind == _ERROR:
                    errors.append(f"encode failed on rank {waiting[0]} of its group: {_text(chunk)}")
                    break
                waiting.pop(0)
        except RuntimeError as error:
            self._lose(error)
        finally:
            self._drain(waiting, bool(errors))
        if errors:
            raise RuntimeError(errors[0])

    def close(self) -> None:
        """Let the ranks that encode return from serve_encoder."""
        if not self._closed:
            self._closed = True
            self.lost = "RanksEncoder: this encoder is closed"
            for rank in range(1, self._peers.size):
                with suppress(RuntimeError):  # it is gone already
                    self._peers.send(rank, [_STOP, 0, 0, 0])

    def _drain(self, waiting: list[int], first_is_done: bool) -> None:
        """Take what is still under way, so that the next call begins at a snapshot."""
        if self.lost is not None:
            return
        try:
            for rank in waiting[1:] if first_is_done else waiting:
                while self._peers.receive(rank)[0] == _CHUNK:
                    pass
        except RuntimeError as error:
            self._lose(error)

    def _lose(self, error: RuntimeError) -> None:
        cause = str(error).splitlines()[0]
        self.lost = (
            "RanksEncoder: lost a rank that encodes; the table stays as it is until the job is started "
            f"again. gloo says: {cause}"
        )
        raise LostRankError(self.lost) from None


def serve_encoder(encode: Encode, group: ProcessGroup, *, timeout: float | None = None) -> None:
    """Encode on this rank whenever the refresher of `group`'s rank 0 asks; return when it is closed.

    encode: called with a snapshot, without gradients; yields this rank's part of the rows, [n, D]. An
        exception is told to the refresher, and the rank goes on.
    timeout: seconds to wait for the next snapshot; None is the group's.
    Raises LostRankError where rank 0 was lost.
    """
    check_timeout("serve_encoder", timeout)
    peers = Peers("serve_encoder", group, timeout)
    try:
        _serve_peers(encode, peers)
    except RuntimeError as error:  # of encode none comes through: the refresher is told
        cause = str(error).splitlines()[0]
        raise LostRankError(
            f"serve_encoder: lost the rank whose table it encodes. gloo says: {cause}"
        ) from None


def _serve_peers(encode: Encode, peers: Peers) -> None:
    while True:
        kind, message = peers.receive(0)
        if kind == _STOP:
            return
        sent = []  # not waited for: rank 0 takes the parts one after another
        try:
            with torch.no_grad():
                for chunk in encode(_from_bytes(message.numpy().tobytes())):
                    check_tensor("serve_encoder", "a chunk", chunk, "[n, D]", (None, None), FLOAT_DTYPES)
                    sent.append(peers.begin(0, _CHUNK, chunk))
            sent.append(peers.begin(0, _END))
        except Exception as error:
            text = f"{type(error).__name__}: {error}".encode()[:4000]
            sent.append(peers.begin(0, _ERROR, _as_tensor(text)))
        for parts in sent:
            for work, _ in parts:
                work.wait()


_STOP, _SNAPSHOT, _CHUNK, _END, _ERROR = range(5)


class Peers:
    """Messages between two ranks of a group: a header (kind, rows, width, dtype), then the bytes."""

    def __init__(self, op: str, group: ProcessGroup, timeout: float | None = None) -> None:
        dist = torch.distributed
        if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"{op}: group must be a ProcessGroup that holds this process, got {group!r}")
        self.group, self.timeout = group, None if timeout is None else timedelta(seconds=timeout)
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.size < 2:
            raise ValueError(
                f"{op}: group must hold a rank that encodes beside rank 0, got {self.size} ranks"
            )
        if "gloo" not in dist.get_backend_config(group):
            raise ValueError(f"{op}: group must be of gloo, got {dist.get_backend_config(group)}")

    def send(self, rank: int, header: list[int], message: Tensor | None = None) -> None:
        for work, _ in self._begin(rank, header, message):
            self._wait(work)

    def begin(self, rank: int, kind: int, chunk: Tensor | None = None) -> list[tuple[Any, Tensor]]:
        """Send without waiting: the works, each with the tensor that must live as long."""
        if chunk is None:
            return self._begin(rank, [kind, 0, 0, 0], None)
        chunk = chunk.detach().to("cpu").contiguous()
        if kind == _ERROR:
            return self._begin(rank, [kind, chunk.numel(), 0, 0], chunk)
        header = [kind, *chunk.shape, FLOAT_DTYPES.index(chunk.dtype)]
        return self._begin(rank, header, chunk.view(torch.uint8))

    def receive(self, rank: int) -> tuple[int, Tensor]:
        """(kind, chunk [n, D]) or (kind, bytes [n]) of the next message of a rank."""
        header = torch.empty(4, dtype=torch.int64)
        self._receive(header, rank)
        kind, rows, width, dtype = header.tolist()
        if kind == _CHUNK:
            chunk = torch.empty(rows, width, dtype=FLOAT_DTYPES[dtype])
        else:
            chunk = torch.empty(rows, dtype=torch.uint8)
        if chunk.numel() > 0:
            self._receive(chunk.view(torch.uint8), rank)
        return kind, chunk

    def _begin(self, rank: int, header: list[int], message: Tensor | None) -> list[tuple[Any, Tensor]]:
        dist = torch.distributed
        to = dist.get_global_rank(self.group, rank)
        parts = [torch.tensor(header)]
        if message is not None and message.numel() > 0:
            parts.append(message)
        return [(dist.isend(part, to, group=self.group), part) for part in parts]

    def _receive(self, tensor: Tensor, rank: int) -> None:
        dist = torch.distributed
        work = dist.irecv(tensor, dist.get_global_rank(self.group, rank), group=self.group)
        assert work is not None  # as for a rank outside of the group
        self._wait(work)

    def _wait(self, work: Any) -> None:
        if self.timeout is None:
            work.wait()
        else:
            work.wait(self.timeout)


def check_timeout(op: str, timeout: float | None) -> None:
    if timeout is not None and not timeout > 0:
        raise ValueError(f"{op}: timeout must be more than 0 seconds, or None, got {timeout!r}")


def _serve_pipe(connection: Connection, encode: Encode, threads: int) -> None:
    """What the process of a ProcessEncoder does until its pipe is closed."""

    def tell(message: dict[str, Any]) -> None:
        connection.send_bytes(json.dumps(message).encode())

    torch.set_num_threads(threads)
    while True:
        try:
            snapshot = _from_bytes(connection.recv_bytes())
        except EOFError:
            return
        try:
            with torch.no_grad():
                for chunk in encode(snapshot):
                    check_tensor("ProcessEncoder", "a chunk", chunk, "[n, D]", (None, None), FLOAT_DTYPES)
                    chunk = chunk.detach().to("cpu").contiguous()
                    tell({"shape": list(chunk.shape), "dtype": FLOAT_DTYPES.index(chunk.dtype)})
                    if chunk.numel() > 0:
                        connection.send_bytes(raw_bytes(chunk))
            tell({})
        except OSError:  # nobody listens any more
            return
        except Exception as error:
            tell({"error": f"{type(error).__name__}: {error}"})


def _to_bytes(snapshot: Any) -> bytes:
    file = io.BytesIO()
    torch.save(snapshot, file)
    return file.getvalue()


def _from_bytes(raw: bytes) -> Any:
    return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)


def _as_tensor(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def _text(message: Tensor) -> str:
    return message.numpy().tobytes().decode(errors="replace").splitlines()[0]
