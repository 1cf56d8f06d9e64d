"""``fastchat-q models``: what is known of models."""

import typer

from . import cli_aliases

app = typer.Typer(name="models", help="What is known of models.", no_args_is_help=True, rich_markup_mode=None)
app.command("ls")(cli_aliases.list_models)
app.command("alias")(cli_aliases.alias)
