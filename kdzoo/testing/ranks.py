"""Run a function on several ranks of this machine, each a fresh process with the real engine."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.multiprocessing

from kdzoo.errors import KdzooError

LONGEST = 1800.0
ADVICE = "call every module equally often on each rank, whatever rows it has"


def on_ranks(
    ranks: int, folder: Path, work: Callable[..., Any], *arguments: Any, seconds: float = LONGEST
) -> list[Any]:
    """What `work(*arguments)` returns on every rank, each a fresh process of this machine, in their order.

    Ranks that do not come together within `seconds` are stopped: a `KdzooError`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    settings = (ranks, port, folder, work, arguments)
    running = torch.multiprocessing.spawn(_rank, settings, nprocs=ranks, join=False)
    end = monotonic() + seconds
    while not running.join(timeout=max(0.0, end - monotonic())):
        if monotonic() > end:
            for process in running.processes:
                process.kill()
            raise KdzooError(f"the ranks wait for each other since {seconds:.0f} s; {ADVICE}")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _rank(rank: int, ranks: int, port: int, folder: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    from kdzoo.engine import distributed

    distributed.start()
    torch.save(work(*arguments), folder / f"{rank}.pt")
    distributed.stop()
