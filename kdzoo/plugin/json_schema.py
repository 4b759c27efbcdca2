"""JSON Schema of pydantic models, and JSON Schema in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel


def json_schema(model: type[BaseModel], definitions: str = "") -> dict[str, Any]:
    """The schema of a model, without titles made of field names; `definitions` prefixes names in `$defs`."""
    from pydantic.json_schema import GenerateJsonSchema

    class Untitled(GenerateJsonSchema):
        def field_title_should_be_set(self, schema: Any) -> bool:
            return False

    schema = model.model_json_schema(schema_generator=Untitled, ref_template=f"#/$defs/{definitions}{{model}}")
    if "$defs" in schema:
        schema["$defs"] = {definitions + name: inner for name, inner in schema["$defs"].items()}
    return schema


def in_words(schema: Mapping[str, Any]) -> str:
    """What a schema takes: "integer ≥ 1", "number or object", "'mean' or 'max'". Null is not mentioned."""
    match schema:
        case {"const": value}:
            return value_in_words(value)
        case {"enum": values}:
            return " or ".join(value_in_words(value) for value in values)
        case {"anyOf": branches} | {"oneOf": branches}:
            words = [in_words(branch) for branch in branches if branch.get("type") != "null"]
            return " or ".join(dict.fromkeys(words))
        case {"$ref": _} | {"type": "object"}:
            return "object"
        case {"type": "boolean"}:
            return "true or false"
        case {"type": "array", "prefixItems": items}:
            return f"list of {len(items)}: {', '.join(in_words(item) for item in items)}"
        case {"type": "array", "items": items}:
            return f"list, each {in_words(items)}"
        case {"type": "array"}:
            return "list"
        case {"type": str(kind)}:
            return " ".join([kind, *_bounds(schema)])
    return "anything"


def value_in_words(value: Any) -> str:
    """A JSON value, strings in single quotes, long ones cut."""
    text = f"'{value}'" if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _bounds(schema: Mapping[str, Any]) -> list[str]:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    return [" and ".join(bounds)] if bounds else []
