"""Two processes that stay, joined by gloo: a test runs one function of its own in both of them."""

from __future__ import annotations

import os
import socket
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2
PATIENCE = 240.0


class Processes:
    """As many processes as there are ranks, as torchrun would have started them."""

    def __init__(self, ranks: int = RANKS) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        # A fork has everything imported already; but not where the parent may have used a GPU.
        context = mp.get_context("forkserver" if torch.cuda.is_available() else "fork")
        self._pipes, self._members = [], []
        for rank in range(ranks):
            here, there = context.Pipe()
            member = context.Process(target=_serve, args=(there, rank, ranks, port), daemon=True)
            member.start()
            there.close()
            self._pipes.append(here)
            self._members.append(member)

    def run(self, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Runs a function of a module in all ranks; returns what it returned, by rank."""
        self.start(job, *arguments)
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(PATIENCE):
                self.stop()
                raise AssertionError(f"rank {rank} hangs in {job.__name__}")
            answers.append(pipe.recv())
        failures = [text for worked, text in answers if not worked]
        assert not failures, "\n".join(failures)
        return [value for _, value in answers]

    def start(self, job: Callable[..., Any], *arguments: Any) -> None:
        """Begins a job in all ranks, without waiting for it."""
        for pipe in self._pipes:
            pipe.send((job, arguments))

    def ended(self, rank: int) -> int | None:
        """The exit code of a rank that has to end by itself."""
        self._members[rank].join(PATIENCE)
        return self._members[rank].exitcode

    def answer(self, rank: int) -> Any:
        """What a job has returned in a rank."""
        assert self._pipes[rank].poll(PATIENCE)
        return self._pipes[rank].recv()[1]

    def stop(self) -> None:
        for member in self._members:
            member.kill()
            member.join()


def _serve(pipe: Any, rank: int, ranks: int, port: int) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        WORLD_SIZE=str(ranks),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        LOCAL_WORLD_SIZE=str(ranks),
        TORCHELASTIC_RUN_ID="tests",
        LIGHTNING_PRIVACY_CACHE="off",
        OMP_NUM_THREADS="1",
    )
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    while True:
        try:
            job, arguments = pipe.recv()
        except EOFError:
            return
        # As for each test, whatever ran before.
        torch.manual_seed(0)
        try:
            pipe.send((True, job(*arguments)))
        except BaseException:  # noqa: BLE001 - the test shows it
            last = traceback.format_exc().splitlines()[-12:]
            pipe.send((False, "\n".join([f"rank {rank}:", *last])))
