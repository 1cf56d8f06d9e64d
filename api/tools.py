"""The tools of a chat request, in OpenAI's shape."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from .fields import NAME, JsonObject, Strict, Text


class Function(Strict):
    """A function that the model may call."""

    name: str = Field(pattern=NAME)
    description: Text | None = None
    parameters: JsonObject | None = None
    """A JSON schema; none: no parameters."""
    strict: bool | None = None


class Tool(Strict):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function

    def to_object(self) -> dict[str, Any]:
        """OpenAI's object, without nulls, as chat templates take it."""
        given = {name: value for name, value in self.function if value is not None}
        return {"type": self.type, "function": given}


class FunctionName(Strict):
    """A function by its name."""

    name: str


class NamedTool(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


class Subset(Strict):
    """Some of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1)


class AllowedTools(Strict):
    """The tools that may be called, of those that the request has."""

    type: Literal["allowed_tools"]
    allowed_tools: Subset


def _branch(choice: Any) -> str:
    """By the type alone, so that an error names what is wrong with the one that was meant."""
    kind = choice.get("type") if isinstance(choice, dict) else getattr(choice, "type", None)
    return "AllowedTools" if kind == "allowed_tools" else "NamedTool"


ChosenTools = Annotated[
    Annotated[NamedTool, Tag("NamedTool")] | Annotated[AllowedTools, Tag("AllowedTools")], Discriminator(_branch)
]
