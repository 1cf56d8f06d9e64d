"""``fastchat-q key``: makes, lists, changes and revokes API keys. It talks to Redis alone; no API server need run."""

import re
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any

import typer

from .cli_common import (
    EXIT_NOT_FOUND,
    EXIT_USAGE,
    AsJson,
    RedisUrl,
    StateDir,
    T,
    fail,
    load_settings,
    print_json,
    print_table,
    printable,
    say,
    with_redis,
)

COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
COLUMNS = ("id", "name", "tenant", "scopes", "models", "limits", "created", "expires", "key", "state")

app = typer.Typer(
    name="key",
    help="API keys: make, list, change and revoke them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@app.command()
def create(
    name: Annotated[str, typer.Option("--name", help="For people: who or what uses the key.")],
    tenant: Annotated[
        str | None, typer.Option("--tenant", help="Keys of one tenant share its turn. [default: the key's own id]")
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option("--scope", help="inference, batch or admin; repeat it. [default: inference, batch]"),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="A model it may use, or NAME*; repeat it. [default: all]")
    ] = None,
    expires: Annotated[str | None, typer.Option("--expires", help="30d, 12h, or a date as ISO 8601.")] = None,
    rpm: Annotated[int | None, typer.Option("--rpm", min=1, help="Requests a minute.")] = None,
    tpm: Annotated[int | None, typer.Option("--tpm", min=1, help="Tokens a minute, prompt and completion.")] = None,
    token_quota: Annotated[
        str | None, typer.Option("--token-quota", help="Tokens ever, prompt and completion: 500000, 500k, 1.5m.")
    ] = None,
    parallel: Annotated[int | None, typer.Option("--parallel", min=1, help="Running jobs.")] = None,
    queued: Annotated[int | None, typer.Option("--queued", min=1, help="Waiting jobs.")] = None,
    weight: Annotated[int, typer.Option("--weight", min=1, max=1000, help="Its tenant's share of a full queue.")] = 1,
    as_json: AsJson = False,
    state_dir: StateDir = None,
    redis_url: RedisUrl = None,
) -> None:
    """Make a key and print it: once, here, and nowhere else."""
    from pydantic import ValidationError

    from .keystore import KeyStore
    from .tenants import DEFAULT_SCOPES, MAX_NAME, Caller, new_key_id

    if not 1 <= len(name.strip()) <= MAX_NAME:
        raise typer.BadParameter(f"--name: 1 to {MAX_NAME} characters.")
    key_id = new_key_id()
    fields = {
        "key_id": key_id,
        "tenant": tenant or key_id,
        "scopes": scope or DEFAULT_SCOPES,
        "models": model or (),
        "expires": None if expires is None else parse_expiry(expires, datetime.now(UTC)),
        "rpm": rpm,
        "tpm": tpm,
        "token_quota": None if token_quota is None else parse_count(token_quota),
        "max_parallel": parallel,
        "max_queued": queued,
        "weight": weight,
    }
    try:
        caller = Caller.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise typer.BadParameter(f"{first['loc'][0]}: {first['msg']} (given: {first['input']!r})") from None

    async def make(store: KeyStore) -> tuple[str, Any]:
        return await store.create(caller, name.strip())

    key, record = _run(make, state_dir, redis_url)
    if as_json:
        print_json({"key": key, **shown(record)})
        return
    print(key)
    say(f"\n{record.caller.key_id} ({name}). This is the only time the key is shown: what is stored is a keyed hash.")


@app.command(name="ls")
def list_keys(as_json: AsJson = False, state_dir: StateDir = None, redis_url: RedisUrl = None) -> None:
    """List the keys, oldest first."""
    from .keystore import KeyStore

    async def read(store: KeyStore) -> list[tuple[Any, int]]:
        records = await store.all()
        return list(zip(records, await store.used(records), strict=True))

    rows = [shown(record, used) for record, used in _run(read, state_dir, redis_url)]
    if as_json:
        print_json({"object": "list", "data": rows})
        return
    print_table(COLUMNS, [_row(row) for row in rows])
    if not rows:
        say("No API keys. Make one with: fastchat-q key create --name NAME")


@app.command()
def quota(
    id_or_name: Annotated[str, typer.Argument(metavar="ID_OR_NAME")],
    tokens: Annotated[
        str, typer.Argument(metavar="TOKENS", help="The new total, such as 2m; or so many more: +500k; or none.")
    ],
    as_json: AsJson = False,
    state_dir: StateDir = None,
    redis_url: RedisUrl = None,
) -> None:
    """Give a key another token quota. API servers know it within 5 seconds; what was used stays used."""
    from .keystore import AmbiguousNameError, KeyStore, UnknownKeyError

    amount = None if tokens == "none" else parse_count(tokens.removeprefix("+"))

    def changed(before: int | None) -> int | None:
        return amount if amount is None or not tokens.startswith("+") else (before or 0) + amount

    async def change(store: KeyStore) -> tuple[Any, int]:
        record = await store.set_quota(id_or_name, changed)
        return record, (await store.used([record]))[0]

    try:
        record, used = _run(change, state_dir, redis_url)
    except UnknownKeyError as error:
        fail(str(error), EXIT_NOT_FOUND)
    except AmbiguousNameError as error:
        fail(str(error), EXIT_USAGE)
    except ValueError:
        raise typer.BadParameter(f"{tokens!r}: a quota is 1 to 10^15 tokens.") from None
    if as_json:
        print_json(shown(record, used))
        return
    caller = record.caller
    now = "has no quota" if caller.token_quota is None else f"has a quota of {caller.token_quota} tokens, {used} used"
    print(printable(f"{caller.key_id} ({record.name}) {now}"))


@app.command()
def revoke(
    id_or_name: Annotated[str, typer.Argument(metavar="ID_OR_NAME")],
    as_json: AsJson = False,
    state_dir: StateDir = None,
    redis_url: RedisUrl = None,
) -> None:
    """Delete a key. API servers refuse it within 5 seconds; what it has queued goes on."""
    from .keystore import AmbiguousNameError, KeyStore, UnknownKeyError

    async def delete(store: KeyStore) -> Any:
        return await store.revoke(id_or_name)

    try:
        record = _run(delete, state_dir, redis_url)
    except UnknownKeyError as error:
        fail(str(error), EXIT_NOT_FOUND)
    except AmbiguousNameError as error:
        fail(str(error), EXIT_USAGE)
    if as_json:
        print_json(shown(record))
    else:
        print(printable(f"revoked {record.caller.key_id} ({record.name})"))


def parse_count(text: str) -> int:
    """``500000``, ``500k``, ``1.5m``, ``2b``.

    Raises:
        typer.BadParameter: it is none of these.
    """
    match = re.fullmatch(r"(\d{1,18}(?:_\d+)*(?:\.\d+)?)([kmb]?)", text.strip().lower())
    if match is None:
        raise typer.BadParameter(f"{text!r} is no number of tokens: write it as 500000, 500k or 1.5m.")
    return round(Decimal(match[1]) * COUNTS[match[2]])


def parse_expiry(text: str, now: datetime) -> int:
    """``30d`` from ``now``, or a date or time as ISO 8601 (without an offset: UTC) -> unix seconds.

    Raises:
        typer.BadParameter: neither, or in the past.
    """
    relative = re.fullmatch(r"(\d{1,6})([smhdw])", text)
    try:
        if relative:
            when = now + timedelta(seconds=int(relative[1]) * UNITS_S[relative[2]])
        else:
            when = datetime.fromisoformat(text)
            when = when if when.tzinfo else when.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"{text!r} is neither a span such as 30d or 12h nor a date as ISO 8601.") from None
    if when <= now:
        raise typer.BadParameter(f"{text!r} is in the past.")
    return int(when.timestamp())


def shown(record: Any, used: int = 0) -> dict[str, Any]:
    """A key as ``--json`` shows it: stable names, times as ISO 8601 in UTC."""
    from .credentials import KEY_PREFIX
    from .records import iso

    caller = record.caller
    expired = caller.expired(datetime.now(UTC).timestamp())
    return {
        "id": caller.key_id,
        "name": record.name,
        "tenant": caller.tenant,
        "scopes": sorted(caller.scopes),
        "models": list(caller.models),
        "limits": {
            "requests_per_minute": caller.rpm,
            "tokens_per_minute": caller.tpm,
            "parallel": caller.max_parallel,
            "queued": caller.max_queued,
            "tokens": caller.token_quota,
        },
        "tokens_used": None if caller.token_quota is None else used,
        "tokens_left": None if caller.token_quota is None else max(0, caller.token_quota - used),
        "weight": caller.weight,
        "created": iso(record.created * 1000),
        "expires": None if caller.expires is None else iso(caller.expires * 1000),
        "key_hint": f"{KEY_PREFIX}…{record.last4}",
        "state": "expired" if expired else "active",
    }


def _row(key: dict[str, Any]) -> list[Any]:
    names = (("requests_per_minute", "rpm"), ("tokens_per_minute", "tpm"), ("parallel", "run"), ("queued", "wait"))
    limits = [f"{key['limits'][name]} {unit}" for name, unit in names if key["limits"][name] is not None]
    if key["tokens_left"] is not None:
        limits.append(f"{key['tokens_left']} of {key['limits']['tokens']} tokens left")
    if key["weight"] != 1:
        limits.append(f"weight {key['weight']}")
    return [
        key["id"],
        key["name"],
        None if key["tenant"] == key["id"] else key["tenant"],
        ",".join(key["scopes"]),
        ",".join(key["models"]) or "all",
        " · ".join(limits),
        key["created"][:10],
        key["expires"],
        key["key_hint"],
        key["state"],
    ]


def _run(action: Callable[[Any], Awaitable[T]], state_dir: Any, redis_url: str | None) -> T:
    """Does something with the keys in the Redis of the settings; ends the command when that cannot be reached."""
    from .credentials import load_or_create_pepper
    from .keystore import KeyStore

    settings = load_settings(state_dir=state_dir, redis_url=redis_url)
    pepper = load_or_create_pepper(settings)
    return with_redis(settings, lambda redis: action(KeyStore(redis, pepper)))
