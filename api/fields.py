"""What all requests share: strict types, JSON that can be passed on, and errors that name their field."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

NAME = r"^[a-zA-Z0-9_-]{1,64}$"
"""Of functions and schemas, as OpenAI has them."""
MAX_METADATA = 16
MAX_JSON_DEPTH = 64
"""Of objects that are passed on as they are, such as schemas."""


class Strict(BaseModel):
    """Strict: "5" is no number and true is no count, as in OpenAI's API."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


def field_error(name: str, message: str, given: Any = None) -> PydanticCustomError:
    """For validators of whole objects: ``name`` is the path of the field within the object."""
    return PydanticCustomError("field", "{message}", {"name": name, "message": message, "given": given})


def _is_unicode(text: str) -> str:
    """Refuses lone surrogates, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("string_unicode", "Input should be valid Unicode, without lone surrogates") from error
    return text


Text = Annotated[str, AfterValidator(_is_unicode)]
Metadata = Annotated[
    dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]], Field(max_length=MAX_METADATA)
]
"""What clients note with a request, in OpenAI's limits."""


def list_or_text(value: Any) -> str:
    """The tag of one of two: an error is then of the one that was meant, and names its limits."""
    return "LIST" if isinstance(value, list | tuple) else "TEXT"


def _can_be_passed_on(value: dict[str, Any]) -> dict[str, Any]:
    """Refuses what Python's parser takes and others do not: NaN, lone surrogates, huge numbers, endless nesting."""
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        if not level:
            return value
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below += one.keys()
                below += one.values()
            elif isinstance(one, list):
                below += one
            elif isinstance(one, str):
                _is_unicode(one)
            elif isinstance(one, float) and not math.isfinite(one):
                raise PydanticCustomError("finite_number", "Input should hold finite numbers only")
            elif isinstance(one, int) and not -(2**63) <= one < 2**64:
                raise PydanticCustomError("int_size", "Input should hold no integers of more than 64 bits")
        level = below
    raise PydanticCustomError(
        "json_depth", "Input should be nested at the most {limit} levels deep", {"limit": MAX_JSON_DEPTH}
    )


JsonObject = Annotated[dict[str, Any], AfterValidator(_can_be_passed_on)]


def without_neutral(
    data: Any, table: Mapping[str, tuple[Any, ...]], instead: Mapping[str, str] = MappingProxyType({})
) -> Any:
    """The object without the table's fields; refuses those that ask for something.

    Args:
        table: by field, the values that ask for nothing.
        instead: by field, the one that does what it asked for.
    """
    if not isinstance(data, dict):
        return data
    for name, neutral in table.items():
        if name in data and not any(_same(data[name], one) for one in neutral):
            raise PydanticCustomError(
                "unsupported_parameter",
                "'{name}' is not supported by this server",
                {"name": name, "instead": instead.get(name)},
            )
    return {name: value for name, value in data.items() if name not in table}


def _same(given: Any, neutral: Any) -> bool:
    """Equal, and no boolean for a number."""
    return given == neutral and isinstance(given, bool) == isinstance(neutral, bool)
