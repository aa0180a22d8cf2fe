"""Data parallelism on one machine: processes that hold the same weights bit by bit and share the tokens of every step.

The first process leads. It starts the others, alone reads and writes checkpoints, and what it holds when a stage begins
is what all begin with. The others follow: they leave nothing behind, and end when it ends, however it ends.
"""

import contextlib
import datetime
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from baltoro.optim.muon import MatrixFunction, each


@dataclass(frozen=True)
class Group:
    """Process `rank` of `size`. All of them call the same methods in the same order with tensors of the same shapes,
    and hold the same values afterwards. Raises ConnectionError where another one is gone."""

    rank: int = 0
    size: int = 1

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Fill the tensors with the first process's."""
        if self.size > 1:
            with _connected():
                for tensor in tensors:
                    dist.broadcast(tensor.detach(), src=0)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Fill the tensors, of one dtype, with their sums over the processes."""
        self._reduce(tensors, dist.ReduceOp.SUM)

    def raise_to_highest(self, tensors: Sequence[Tensor]) -> None:
        """Fill the tensors, of one dtype, with the largest values of any process."""
        self._reduce(tensors, dist.ReduceOp.MAX)

    def divide(self, function: MatrixFunction, stacks: list[Tensor]) -> list[Tensor]:
        """function(stack) of every stack [n, rows, columns]; each process computes some of the matrices, of equal work
        if that is a matrix's size times its shorter side."""
        if self.size == 1:
            return each(function, stacks)
        work = torch.cat([torch.full((len(s),), float(s[0].numel() * min(s.shape[1:]))) for s in stacks]).cumsum(0)
        cuts = torch.searchsorted(work, work[-1] * torch.arange(1, self.size) / self.size)
        edges = [0, *cuts.tolist(), len(work)]
        results = [torch.empty_like(stack) for stack in stacks]
        shares: list[tuple[int, Tensor, Tensor]] = []  # who computes which matrices, and where they go
        first = 0
        for stack, result in zip(stacks, results, strict=True):
            for rank, (begin, end) in enumerate(itertools.pairwise(edges)):
                part = slice(max(begin - first, 0), max(end - first, 0))
                if len(stack[part]):
                    shares.append((rank, stack[part], result[part]))
            first += len(stack)
        for rank, matrices, result in shares:
            if rank == self.rank:
                result.copy_(function(matrices))
        with _connected():
            for rank, _, result in shares:
                dist.broadcast(result, src=rank)
        return results

    def _reduce(self, tensors: Sequence[Tensor], operation: dist.ReduceOp.RedOpType) -> None:
        if self.size > 1:
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            with _connected():
                dist.all_reduce(flat, operation)
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))


ALONE = Group()


@contextlib.contextmanager
def leading(size: int, meeting: Path, follow: Callable[[Group], None]) -> Generator[Group]:
    """The group of this process and of size - 1 others, started here, that run `follow`, which must be picklable.
    meeting: a path that nothing else uses, where they find each other."""
    if size == 1:
        yield ALONE
        return
    meeting.unlink(missing_ok=True)
    spawn = multiprocessing.get_context("spawn")
    ranks = range(1, size)
    others = [spawn.Process(target=_follow, args=(rank, size, meeting, follow), daemon=True) for rank in ranks]
    for process in others:
        process.start()
    try:
        with _joined(0, size, meeting, others) as group:
            yield group
    finally:
        for process in others:
            process.kill()
            process.join()
        meeting.unlink(missing_ok=True)


def _follow(rank: int, size: int, meeting: Path, follow: Callable[[Group], None]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the leader's to answer
    threading.Thread(target=_end_with_the_leader, daemon=True).start()
    with contextlib.suppress(ConnectionError), _joined(rank, size, meeting) as group:
        follow(group)


def _end_with_the_leader() -> None:
    """Also where no message would tell: before all have met."""
    leader = multiprocessing.parent_process()
    assert leader is not None
    leader.join()
    os._exit(1)


_PATIENCE = datetime.timedelta(days=7)
"""How long a process waits for another that lives: one may be suspended; one that died is noticed at once."""


@contextlib.contextmanager
def _joined(rank: int, size: int, meeting: Path, others: Sequence[BaseProcess] = ()) -> Generator[Group]:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(meeting), size)  # pyright: ignore[reportPrivateImportUsage]
    store.set(str(rank), "here")
    for other, process in enumerate(others, 1):
        while not store.check([str(other)]):
            if not process.is_alive():
                raise ConnectionError(f"training process {other} ended as it began; its error stands above")
            time.sleep(0.05)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    try:
        yield Group(rank, size)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _connected() -> Generator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(f"a training process was lost ({error}); start again to go on where it stopped") from None
