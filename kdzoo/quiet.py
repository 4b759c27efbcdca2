"""Libraries that chat on the screen, silenced while they work: a fault reaches the user as our one line."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_hub() -> Iterator[None]:
    """No progress bars, advice or warnings of huggingface_hub; as before afterwards. Imports nothing heavier."""
    from huggingface_hub import utils as hub

    logger, bars = logging.getLogger("huggingface_hub"), not hub.are_progress_bars_disabled()
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        hub.disable_progress_bars()
        try:
            yield
        finally:
            logger.setLevel(level)
            if bars:
                hub.enable_progress_bars()


@contextmanager
def quiet() -> Iterator[None]:
    """The same, and transformers too."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with quiet_hub():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


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
