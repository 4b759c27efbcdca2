"""Processes: how they are started, how they find each other, and the few collectives that runs need."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kdzoo.errors import KdzooError

Value = TypeVar("Value")
Key = TypeVar("Key")


def launched_from_outside() -> bool:
    """Whether torchrun, the deepspeed launcher or Slurm has started this process as one of several."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return True
    return int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ


def join_slurm() -> None:
    """Translate Slurm's variables into those of torch, where Slurm alone started us."""
    if "RANK" in os.environ or "SLURM_PROCID" not in os.environ:
        return
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
    first = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": os.environ["SLURM_NTASKS"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", first),
        # The same port on every rank of one job, and another one for the next job on this node.
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(20_000 + int(os.environ["SLURM_JOB_ID"]) % 20_000)),
    }


def default_ranks() -> int:
    """One rank per GPU, or one."""
    return max(1, torch.cuda.device_count())


def run_on_ranks(ranks: int, work: Callable[[], int]) -> int:
    """Call `work` here where we already are one of several ranks or the only one, else in `ranks` new processes.

    Returns the exit code: the first failing rank's, or 0; negative: the signal that ended a rank. `work` must be
    picklable.
    """
    if launched_from_outside():
        join_slurm()
        return work()
    if ranks == 1:
        with socket.socket() as probe:  # any free port: two runs on one machine must not meet
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        with _environment(alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}):
            return work()
    if torch.cuda.is_available() and ranks > torch.cuda.device_count():
        raise KdzooError(f"--ranks: {ranks} ranks on {torch.cuda.device_count()} GPUs; at most one rank per GPU")
    from torch.distributed.elastic.agent.server.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The agent reports every signal and exit in the log; ours is the one line that the failing rank leaves.
    for name in tuple(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // ranks))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=f"kdzoo-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        start_method="spawn",
        monitor_interval=0.2,
    )
    try:
        with _environment({"OMP_NUM_THREADS": threads}), _signal_handlers():
            codes = elastic_launch(config, _as_a_process)(work)
    except ChildFailedError as failed:
        found = [failure.exitcode for failure in failed.failures.values()]
        return next((code for code in found if code > 0), found[0])
    except SignalException as signalled:
        if signalled.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        return 128 + signalled.sigval
    return max(codes.values())


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """These variables within the block, and afterwards what they were before: a later call is not taken for a rank."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _signal_handlers() -> Iterator[None]:
    """After the block what they were before it: torch's launcher sets its own, for which ctrl-C is no interrupt."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is not handler:  # never in a thread, where torch sets none and we may not
                signal.signal(number, handler)


def _as_a_process(work: Callable[[], int]) -> int:
    """`work` on one rank. A code other than 0 ends the process, so that the agent stops the others."""
    # ctrl-C reaches all of us, and the launching process says so: a rank just goes. Its logs are on disk line by line.
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    code = work()
    if code:
        raise SystemExit(code)
    return code


def start() -> torch.device:
    """Join the process group (NCCL with CUDA, gloo without) and return this rank's device."""
    import deepspeed

    from kdzoo.engine.quiet import calm_deepspeed

    calm_deepspeed()
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    if not torch.cuda.is_available():
        # The gradient of a softmax over a large vocabulary is full of numbers too small for float32's normal range,
        # and a CPU multiplies those some twenty times more slowly. Set before its worker threads exist, who inherit it.
        torch.set_flush_denormal(True)
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def stop() -> None:
    """Undo `start`. DeepSpeed forgets the groups that it made: a later `start` in this process makes its own."""
    if dist.is_initialized():
        import deepspeed

        deepspeed.comm.destroy_process_group()
    if not torch.cuda.is_available():
        torch.set_flush_denormal(False)


def lost_a_rank(error: Exception) -> bool:
    """Whether this is what a collective raises when another rank has ended. Gloo has no kind of its own for it."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def from_rank_0(value: Value) -> Value:
    """Rank 0's value on every rank."""
    if world() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: Value) -> list[Value]:
    """Every rank's value, in order of rank, on every rank."""
    if world() == 1:
        return [value]
    box: list[Any] = [None] * world()
    dist.all_gather_object(box, value)
    return box


@contextmanager
def rank_0_first() -> Iterator[None]:
    """Rank 0 does the block alone (fills a cache, say), then the others (who find it)."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


def summed(values: Mapping[str, Tensor], device: torch.device) -> dict[str, float]:
    """Scalars summed over ranks, in one collective. Every rank brings the same names."""
    names = sorted(values)
    if not names:
        return {}
    stacked = torch.stack([values[name].detach().to(device, torch.float64) for name in names])
    if world() > 1:
        dist.all_reduce(stacked)
    return dict(zip(names, stacked.tolist(), strict=True))


def added_up(values: Mapping[Key, Tensor], device: torch.device) -> dict[Key, Tensor]:
    """Tensors summed over ranks, one collective each. Every rank brings the same names, in the same order."""
    found = {name: value.detach().to(device) for name, value in values.items()}
    if world() > 1:
        for value in found.values():
            dist.all_reduce(value)
    return found
