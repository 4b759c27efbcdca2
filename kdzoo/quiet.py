"""Libraries that chat on the screen, silenced while they work: a fault reaches the user as our one line."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, advice or warnings of transformers and huggingface_hub; as before afterwards."""
    from huggingface_hub import utils as hub
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    hub_logger, hub_bars = logging.getLogger("huggingface_hub"), not hub.are_progress_bars_disabled()
    hub_level = hub_logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers_logging.set_verbosity(logging.CRITICAL)
        transformers_logging.disable_progress_bar()
        hub_logger.setLevel(logging.CRITICAL)
        hub.disable_progress_bars()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            hub_logger.setLevel(hub_level)
            if bars:
                transformers_logging.enable_progress_bar()
            if hub_bars:
                hub.enable_progress_bars()


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """The same, and `datasets` too."""
    from datasets import utils

    verbosity, bars = utils.logging.get_verbosity(), not utils.are_progress_bars_disabled()
    utils.logging.set_verbosity(logging.CRITICAL)
    utils.disable_progress_bars()
    try:
        with quiet():
            yield
    finally:
        utils.logging.set_verbosity(verbosity)
        if bars:
            utils.enable_progress_bars()
