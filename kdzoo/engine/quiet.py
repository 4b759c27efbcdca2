"""What DeepSpeed does at start that nobody asked for, and prints that nobody can act on. Real errors stay."""

from __future__ import annotations

import logging
import warnings

import deepspeed


def calm_deepspeed() -> None:
    """Errors only on the screen, and no C++ compiler at work when a run starts on a CPU."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="deepspeed")
    # Names of collectives that newer torch deprecates and DeepSpeed still calls.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # Shared memory serves its all-reduce on CPUs. ZeRO-3 hardly uses one, and building it takes half a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
