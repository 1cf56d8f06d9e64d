"""``fastchat-q models``: what is known of models."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import cli_aliases
from .cli_common import EXIT_NOT_FOUND, AsJson, fail, print_json, print_table

if TYPE_CHECKING:
    from .workers.families import Family

COLUMNS = ("family", "template", "tools", "reasoning", "notes")
NOTE_WIDTH = 60
EXAMPLE = [
    {"role": "user", "content": "What is 7 + 5?"},
    {"role": "assistant", "content": "12"},
    {"role": "user", "content": "And 12 + 5?"},
]

app = typer.Typer(name="models", help="What is known of models.", no_args_is_help=True, rich_markup_mode=None)
app.command("ls")(cli_aliases.list_models)
app.command("alias")(cli_aliases.alias)


@app.command("families")
def list_families(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One family, with a prompt it renders.")] = None,
    as_json: AsJson = False,
) -> None:
    """Families of models: chat template, format of tool calls and reasoning. NAME goes to --chat-template."""
    from .workers.families import families

    if name is None:
        rows = list(families().values())
        if as_json:
            print_json({"object": "list", "data": [_row(family) for family in rows]})
            return
        print_table(COLUMNS, [_cells(family) for family in rows])
        return
    family = families().get(name)
    if family is None:
        from difflib import get_close_matches

        close = get_close_matches(name, families(), n=3)
        fail(f"There is no family {name!r}{'; did you mean ' + ' or '.join(close) if close else ''}.", EXIT_NOT_FOUND)
    example = _example(family)
    if as_json:
        print_json(_row(family) | {"example": example})
        return
    width = max(map(len, type(family).model_fields)) + 2
    for key, value in _row(family).items():
        text = "\n".join(map(str, value)) if isinstance(value, list) else str(value)
        print(f"{key:{width}}" + text.replace("\n", "\n" + " " * width))
    if example is not None:
        print(f"\nThe prompt of three turns:\n\n{example}")


def _row(family: "Family") -> dict[str, Any]:
    """What the row says; what it leaves open is left out."""
    return family.model_dump(mode="json", exclude_defaults=True)


def _cells(family: "Family") -> tuple[str | None, ...]:
    template = "bundled" if family.bundled else f"- ({family.api} api)" if family.api is not None else "the model's"
    notes = family.notes or ""
    short = notes if len(notes) <= NOTE_WIDTH else notes[: NOTE_WIDTH - 1] + "…"
    return (family.name, template, family.tool_parser, family.reasoning_parser, short)


def _example(family: "Family") -> str | None:
    template = family.chat_template()
    if template is None:
        return None
    try:
        from .workers.families.preview import render
    except ModuleNotFoundError as error:
        return f"(to see it: pip install {error.name})"
    return render(template, EXAMPLE)
