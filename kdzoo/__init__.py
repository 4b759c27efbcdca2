"""kdzoo: white-box knowledge distillation for language models.

A plugin imports its names from here and nowhere deeper: those of `kdzoo.api`, looked up on first use, so that
`kdzoo --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdzoo.api import *  # noqa: F403

    __version__: str


def __getattr__(name: str) -> Any:
    """A public name, or the list of them (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("kdzoo")
    elif name == "__all__":
        value = import_module("kdzoo.api").__all__
    elif name.startswith("_") or name not in __getattr__("__all__"):
        raise AttributeError(f"module 'kdzoo' has no attribute '{name}'")
    else:
        value = getattr(import_module("kdzoo.api"), name)
    globals()[name] = value
    return value
