"""Run a function on several ranks of this machine, each a fresh process with the real engine."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing


def on_ranks(ranks: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns on every rank, in their order."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    torch.multiprocessing.spawn(_rank, (ranks, port, folder, work, arguments), nprocs=ranks)
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
