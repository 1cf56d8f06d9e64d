"""``fastchat-q models ls|alias``: what is served and loaded, and the names that stand for models."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_common import (
    EXIT_NOT_FOUND,
    EXIT_USAGE,
    AsJson,
    RedisUrl,
    StateDir,
    fail,
    load_settings,
    print_json,
    print_table,
    say,
    with_redis,
)

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from .aliases import Alias
    from .registry import Registration
    from .settings import Settings


def list_models(as_json: AsJson = False, redis_url: RedisUrl = None, state_dir: StateDir = None) -> None:
    """Each model with the workers that serve it, load it, or would load it for a job."""

    async def read(redis: "Redis") -> "list[Registration]":
        from .registry import Registry

        return sorted(await Registry(redis).workers(), key=lambda entry: entry.card.name)

    entries = with_redis(load_settings(redis_url=redis_url, state_dir=state_dir), read)
    if as_json:
        print_json({"object": "list", "data": [_entry(entry) for entry in entries]})
        return
    columns = ("model", "state", "progress", "slots", "running", "engine", "device", "worker", "reason")
    print_table(columns, [_row(entry) for entry in entries])
    if not entries:
        say("No worker is there. Start one: fastchat-q worker --model tiny")


def alias(
    definition: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME=MODEL:WEIGHT,…]", help="Make or replace an alias; NAME= removes it. [default: list all]"
        ),
    ] = None,
    rm: Annotated[str | None, typer.Option("--rm", metavar="NAME", help="Remove an alias.")] = None,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
    state_dir: StateDir = None,
) -> None:
    """Let a name stand for one model, or for several by their weights: models alias chat=vicuna:0.9,vicuna-next:0.1."""
    settings = load_settings(redis_url=redis_url, state_dir=state_dir)
    if definition is not None and rm is not None:
        fail("Give an alias to make, or --rm NAME, not both.", EXIT_USAGE)
    if definition is not None and definition.endswith("="):
        rm, definition = definition[:-1], None
    if rm is not None:
        _remove(settings, rm)
    elif definition is not None:
        _put(settings, definition, as_json)
    else:
        _list(settings, as_json)


def _list(settings: "Settings", as_json: bool) -> None:
    async def read(redis: "Redis") -> "tuple[list[Alias], set[str]]":
        from .aliases import Aliases

        return list((await Aliases(redis).all()).values()), await _there(redis)

    aliases, there = with_redis(settings, read)
    if as_json:
        print_json({"object": "list", "data": [_alias(alias, there) for alias in aliases]})
        return
    rows = [
        (alias.name, model, f"{share:.1%}", "yes" if model in there else "no", "model" if alias.name in there else "")
        for alias in aliases
        for model, share in alias.shares.items()
    ]
    print_table(("alias", "model", "share", "there", "hidden by"), rows)


def _put(settings: "Settings", definition: str, as_json: bool) -> None:
    from .aliases import parse

    made = parse(definition)

    async def put(redis: "Redis") -> set[str]:
        from .aliases import Aliases

        there = await _there(redis)
        await Aliases(redis).put(made, there)
        return there

    there = with_redis(settings, put)
    for model in made.weights:
        if model not in there:
            say(f"fastchat-q: warning: no worker serves {model!r} now; until one does, the others get its share.")
    if as_json:
        print_json(_alias(made, there))
    else:
        print(f"{made.name}: " + ", ".join(f"{model} {share:.1%}" for model, share in made.shares.items()))


def _remove(settings: "Settings", name: str) -> None:
    async def remove(redis: "Redis") -> bool:
        from .aliases import Aliases

        return await Aliases(redis).remove(name)

    if not with_redis(settings, remove):
        fail(f"No alias {name!r}. See them: fastchat-q models alias", EXIT_NOT_FOUND)
    print(f"{name} is no alias any more")


async def _there(redis: "Redis") -> set[str]:
    """Names of models that some worker serves, loads, or would load."""
    from .registry import Registry

    return {entry.card.name for entry in await Registry(redis).workers()}


def _alias(alias: "Alias", there: set[str]) -> dict[str, Any]:
    targets = [
        {"model": model, "weight": alias.weights[model], "share": share, "there": model in there}
        for model, share in alias.shares.items()
    ]
    return {"object": "alias", "name": alias.name, "hidden": alias.name in there, "targets": targets}


def _entry(entry: "Registration") -> dict[str, Any]:
    from dataclasses import asdict

    return {"object": "worker", **asdict(entry)}


def _row(entry: "Registration") -> tuple[Any, ...]:
    progress = f"{entry.progress:.0%} {entry.phase}".strip() if entry.state == "loading" else ""
    card = entry.card
    return (
        card.name, entry.state, progress, entry.slots, entry.running, card.engine, card.device, entry.worker_id,
        entry.reason,
    )  # fmt: skip
