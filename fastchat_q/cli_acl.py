"""``fastchat-q redis acl``: prints an access rule for each role, ready for redis-cli or for an aclfile."""

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Literal, NoReturn

import typer

from .choices import Role, ServerVersion

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def is_ours(words: Sequence[str]) -> bool:
    """Whether ``redis WORDS`` asks for the generator: Redis's own ACL never comes without a further word."""
    return words[:1] in (["acl"], ["ACL"]) and (len(words) == 1 or words[1].startswith("-"))


def run(arguments: Sequence[str]) -> NoReturn:
    """Runs the generator with its command line, and ends the process."""
    app(args=list(arguments), prog_name="fastchat-q redis acl")
    raise SystemExit(0)


@app.command()
def acl(
    role: Annotated[
        Literal["all", Role],
        typer.Option("--role", help="For which kind of process; admin: for the fastchat-q key and redis commands."),
    ] = "all",
    form: Annotated[
        Literal["commands", "aclfile"],
        typer.Option("--format", help="commands: to pipe into redis-cli; aclfile: for redis.conf's aclfile."),
    ] = "commands",
    passwords: Annotated[
        Literal["generate", "hash"],
        typer.Option("--passwords", help="hash: the rules hold SHA-256 digests, and stderr gets the passwords."),
    ] = "generate",
    server: Annotated[
        ServerVersion,
        typer.Option("--server", help="The oldest server. 6.2 knows no read-only keys: such keys become writable."),
    ] = "7.0",
    default_off: Annotated[
        bool,
        typer.Option("--default-off", help="Also switch off the user «default»: from then on nobody enters unnamed."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the Redis users of the roles, with new 256-bit passwords. Nothing is sent to Redis."""
    from .acl import ROLES, User
    from .credentials import new_secret

    users = [User(name, new_secret()) for name in ROLES if role in ("all", name)]
    hashed = passwords == "hash"
    if server == "6.2":
        print("Redis 6.2 has no read-only key patterns: what a role should only read, it can write.", file=sys.stderr)
    rules = {user.name: user.rules(version=server, hashed=hashed) for user in users}
    if as_json:
        rows = [{"role": u.role, "user": u.name, "password": u.password, "rules": rules[u.name]} for u in users]
        print(json.dumps(rows, indent=2))
        return
    if default_off:
        rules["default"] = "reset off"  # last: it is the user that sends the others
    for name, rule in rules.items():
        print(f"user {name} {rule}" if form == "aclfile" else f"ACL SETUSER {name} {rule}")
    if hashed:
        for user in users:
            print(f"{user.name} {user.password}", file=sys.stderr)
