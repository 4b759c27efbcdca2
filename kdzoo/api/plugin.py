"""What every plugin is, whatever its kind."""

from __future__ import annotations

import json
import re
from abc import ABC
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator


def _say_what_presets_set(schema: dict[str, Any], params: Any) -> None:
    """At the end of what the field `preset` is described with."""
    for name, chosen in params.presets.items():
        values = ", ".join(f"{key} {json.dumps(value)}" for key, value in chosen.items())
        schema["properties"]["preset"]["description"] += f' "{name}": {values}.'


class Params(BaseModel):
    """The parameters of a plugin: frozen, strict, documented field by field; its JSON Schema is the recipe's."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, json_schema_extra=_say_what_presets_set
    )

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """What a field `preset` may name: a release of the authors' code, and the parameters that reproduce it. What is
    said beside the preset goes before it."""

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, given: Any) -> Any:
        name = given.get("preset") if isinstance(given, Mapping) else None
        return {**cls.presets.get(name, {}), **given} if isinstance(name, str) else given


class NoParams(Params):
    """A plugin without parameters."""


class Plugin(ABC):
    """What a module registers: a class of one of the kinds, each of which is a subclass of this one."""

    kind: ClassVar[str]
    """The kind, as messages and the registry call it."""
    name: ClassVar[str]
    """What recipes say in `use`."""
    texts: ClassVar[tuple[str, ...]] = ("name",)
    """The attributes that users read: each is a line of text."""
    params_type: ClassVar[type[Params]] = Params
    """What its `Params` inherit."""
    Params: ClassVar[type[Params]] = NoParams

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names that it is registered under."""
        return (cls.name,)

    @classmethod
    def declared_fault(cls) -> str | None:
        """Why its declarations are not in order, as the end of a sentence that begins with its class."""
        for text in cls.texts:
            if not is_text(getattr(cls, text, None)):
                return f"has no '{text}'; give it a line of text"
        for name in cls.names():
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                return f"is named '{name}'; use lower-case letters, digits and '_'"
        if not (isinstance(cls.Params, type) and issubclass(cls.Params, cls.params_type)):
            return f"has 'Params' that do not inherit kdzoo.{cls.params_type.__name__}"
        return None


Register = Callable[[type[Plugin]], None]
"""Takes a plugin class of any kind."""


def is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
