"""What DeepSpeed does at start that nobody asked for, and prints that nobody can act on. Real errors stay."""

from __future__ import annotations

import logging
import warnings

from kdzoo.engine.deepspeed_private import leave_out_shared_memory


def calm_deepspeed() -> None:
    """Errors only on the screen, and no C++ compiler at work when a run starts on a CPU."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="deepspeed")
    # Names of collectives that newer torch deprecates and DeepSpeed still calls.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    leave_out_shared_memory()
