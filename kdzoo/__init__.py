"""kdzoo: white-box knowledge distillation for language models.

The public names: a plugin imports from here and nowhere deeper. Each is looked up on first use, so that
`kdzoo --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdzoo.errors import DataError as DataError
    from kdzoo.errors import KdzooError as KdzooError
    from kdzoo.errors import ModelError as ModelError
    from kdzoo.errors import PluginError as PluginError
    from kdzoo.errors import RecipeError as RecipeError
    from kdzoo.plugin.contracts import Aligner as Aligner
    from kdzoo.plugin.contracts import Alignment as Alignment
    from kdzoo.plugin.contracts import Anatomy as Anatomy
    from kdzoo.plugin.contracts import Experts as Experts
    from kdzoo.plugin.contracts import Fusion as Fusion
    from kdzoo.plugin.contracts import FusionParams as FusionParams
    from kdzoo.plugin.contracts import Lexicon as Lexicon
    from kdzoo.plugin.contracts import Loss as Loss
    from kdzoo.plugin.contracts import Mixture as Mixture
    from kdzoo.plugin.contracts import ModelFacts as ModelFacts
    from kdzoo.plugin.contracts import Models as Models
    from kdzoo.plugin.contracts import Needs as Needs
    from kdzoo.plugin.contracts import NoParams as NoParams
    from kdzoo.plugin.contracts import Own as Own
    from kdzoo.plugin.contracts import OwnStream as OwnStream
    from kdzoo.plugin.contracts import Params as Params
    from kdzoo.plugin.contracts import RanksFirst as RanksFirst
    from kdzoo.plugin.contracts import Tokens as Tokens
    from kdzoo.plugin.contracts import Tracker as Tracker
    from kdzoo.plugin.contracts import Visit as Visit
    from kdzoo.plugin.hooks import hookimpl as hookimpl
    from kdzoo.step import ops as ops
    from kdzoo.step.batch import Batch as Batch
    from kdzoo.step.batch import Side as Side
    from kdzoo.step.chunk import Chunk as Chunk
    from kdzoo.step.head import Head as Head
    from kdzoo.step.terms import Terms as Terms
    from kdzoo.step.view import View as View

    __version__: str

_HOMES = {
    "kdzoo.errors": ("DataError", "KdzooError", "ModelError", "PluginError", "RecipeError"),
    "kdzoo.plugin.contracts": (
        "Aligner",
        "Alignment",
        "Anatomy",
        "Experts",
        "Fusion",
        "FusionParams",
        "Lexicon",
        "Loss",
        "Mixture",
        "ModelFacts",
        "Models",
        "Needs",
        "NoParams",
        "Own",
        "OwnStream",
        "Params",
        "RanksFirst",
        "Tokens",
        "Tracker",
        "Visit",
    ),
    "kdzoo.plugin.hooks": ("hookimpl",),
    "kdzoo.step.batch": ("Batch", "Side"),
    "kdzoo.step.chunk": ("Chunk",),
    "kdzoo.step.head": ("Head",),
    "kdzoo.step.terms": ("Terms",),
    "kdzoo.step.view": ("View",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME, "ops"])


def __getattr__(name: str) -> Any:
    """A public name, from where it is defined (PEP 562)."""
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    elif name == "ops":
        value = import_module("kdzoo.step.ops")
    elif name == "__version__":
        from importlib.metadata import version

        value = version("kdzoo")
    else:
        raise AttributeError(f"module 'kdzoo' has no attribute '{name}'")
    globals()[name] = value
    return value
