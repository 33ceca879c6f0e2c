"""What a section of a recipe is: a table whose unknown keys are errors and whose operational keys never count."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class OneOrMany:
    """Of a tuple: a single value stands for a list of one, in the recipe as in its JSON Schema."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(_as_tuple, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        many = handler(schema)
        return {"anyOf": [many, many["items"]]}


def seconds(text: str) -> float:
    """`90s`, `30m` or `2h` in seconds."""
    return float(text[:-1]) * {"s": 1, "m": 60, "h": 3600}[text[-1]]


Time = Annotated[str, Field(pattern=r"^$|^\d+(\.\d+)?[smh]$")]  # see `seconds`; empty: none
Positive = Annotated[int, Field(gt=0)]
Sources = Annotated[tuple[str, ...], OneOrMany()]


def operational(default: Any, description: str, **rules: Any) -> Any:
    """A field that says how a call runs, not what it makes."""
    return Field(default, description=description, json_schema_extra={"operational": True}, **rules)


class Section(BaseModel):
    """A table of the recipe. Unknown keys are errors; values never change once read."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True, allow_inf_nan=False
    )

    def declared(self) -> dict[str, Any]:
        """What enters an artifact's identity: every key that is not operational, defaults filled in, under its TOML
        name.
        """
        kept: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if is_operational(field):
                continue
            kept[field.alias or name] = value.declared() if isinstance(value, Section) else plain(value)
        return kept


def plain(value: Any) -> Any:
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def is_operational(field: FieldInfo) -> bool:
    """Whether a key says how a call runs rather than what it makes."""
    return bool(isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("operational"))
