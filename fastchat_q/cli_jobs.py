"""``fastchat-q jobs``: what runs and waits, one job in full, and cancelling."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .choices import JobFilter
from .cli_common import (
    EXIT_FAILED,
    EXIT_NOT_FOUND,
    AsJson,
    RedisUrl,
    StateDir,
    duration,
    fail,
    load_settings,
    print_json,
    print_table,
    printable,
    say,
    with_redis,
)

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from .overview import Listing
    from .records import JobRecord

OneModel = Annotated[str | None, typer.Option("--model", help="Its name or slug. [default: all known]")]
ShowSpec = Annotated[bool, typer.Option("--spec", help="With the job itself, prompt included.")]

app = typer.Typer(name="jobs", help="Look at jobs, cancel them.", no_args_is_help=True, rich_markup_mode=None)


@app.command("ls")
def list_jobs(
    model: OneModel = None,
    state: Annotated[JobFilter | None, typer.Option("--state", help="[default: all that have not ended]")] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", help="Of this tenant alone.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=10_000, help="For each model.")] = 50,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
    state_dir: StateDir = None,
) -> None:
    """Jobs that have not ended: those that run, then the lines in the order of service."""
    settings = load_settings(redis_url=redis_url, state_dir=state_dir)

    async def read(redis: "Redis") -> "list[Listing]":
        from .overview import live_jobs

        return [await live_jobs(redis, name, limit, state, tenant) for name in await models(redis, model)]

    listings = with_redis(settings, read)
    jobs = [job for listing in listings for job in listing.jobs]
    truncated = not all(listing.complete for listing in listings)
    if as_json:
        print_json({"object": "list", "data": [job.to_dict() for job in jobs], "truncated": truncated})
        return
    columns = ("id", "model", "state", "lane", "tenant", "place", "tokens", "age", "attempt", "worker")
    print_table(columns, [_row(job) for job in jobs])
    if truncated:
        say(f"There are more. See further with --limit (now {limit}), --model, --state or --tenant.")


@app.command()
def show(
    job: Annotated[str, typer.Argument(metavar="ID", help="<slug>.<ULID>, or the ULID alone.")],
    spec: ShowSpec = False,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
    state_dir: StateDir = None,
) -> None:
    """One job: its record, its place, its attempts."""
    show_job(load_settings(redis_url=redis_url, state_dir=state_dir), job, spec, as_json)


@app.command()
def cancel(
    jobs: Annotated[list[str], typer.Argument(metavar="ID...", help="<slug>.<ULID>, or the ULID alone.")],
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
    state_dir: StateDir = None,
) -> None:
    """End jobs at once, for their clients too; says the state each was in."""
    settings = load_settings(redis_url=redis_url, state_dir=state_dir)

    async def end(redis: "Redis") -> list[dict[str, str]]:
        from .keys import public_job_id
        from .overview import find_job
        from .queue import Queue

        done = []
        for job in jobs:
            found = await find_job(redis, job)
            before = await Queue(redis).cancel(*found, "cancelled by an operator") if found else "none"
            done.append({"id": public_job_id(*found) if found else job, "before": before})
        return done

    done = with_redis(settings, end)
    if as_json:
        print_json({"object": "list", "data": [{**row, "cancelled": _was_live(row)} for row in done]})
    for row in done:
        if row["before"] == "none":
            say(f"fastchat-q: {no_such_job(row['id'])}")
        elif not _was_live(row):
            say(f"fastchat-q: {row['id']} had ended already: {row['before']}. See it: fastchat-q jobs show {row['id']}")
        elif not as_json:
            print(f"{row['id']} cancelled (was {row['before']})")
    if any(row["before"] == "none" for row in done):
        raise typer.Exit(EXIT_NOT_FOUND)
    if not all(map(_was_live, done)):
        raise typer.Exit(EXIT_FAILED)


def show_job(settings: Any, job: str, spec: bool, as_json: bool, only_state: str | None = None) -> None:
    """Prints one job, for ``jobs show`` and ``dead show``."""

    async def read(redis: "Redis") -> "JobRecord | None":
        from .overview import find_job
        from .records import read_record

        found = await find_job(redis, job)
        return await read_record(redis, *found, whole=spec) if found else None

    record = with_redis(settings, read)
    if record is None:
        fail(no_such_job(job), EXIT_NOT_FOUND)
    if only_state is not None and record.state != only_state:
        fail(
            f"{record.public_id} is not {only_state}, it is {record.state}. "
            f"See it: fastchat-q jobs show {record.public_id}",
            EXIT_NOT_FOUND,
        )
    document = record.to_dict()
    if spec:
        document["spec"] = decoded(record.spec)
    if as_json:
        print_json(document)
    else:
        _print_record(record, document)


async def models(redis: "Redis", model: str | None) -> list[str]:
    """The model that was asked for, or all that are known; a model nobody knows ends the command with exit code 4."""
    from .overview import find_model, known_models

    if model is None:
        return await known_models(redis)
    found = await find_model(redis, model)
    if found is None:
        known = ", ".join(await known_models(redis)) or "none"
        fail(f"No queue of a model {model!r} (known: {known}). See them: fastchat-q queue ls", EXIT_NOT_FOUND)
    return [found]


def no_such_job(job: str) -> str:
    """What to say of an id that is not found."""
    return (
        f"No job {job!r}: never accepted, or ended so long ago that it is forgotten, or its model is not known "
        "any more (then give the whole id, <slug>.<ULID>). See what is there: fastchat-q jobs ls; fastchat-q dead ls"
    )


def decoded(spec: bytes | None) -> Any:
    """A spec as an object; as text if it is no JSON; None if it is gone."""
    import json

    if spec is None:
        return None
    try:
        return json.loads(spec)
    except ValueError:
        return spec.decode(errors="backslashreplace")


def _was_live(row: dict[str, str]) -> bool:
    return row["before"] in ("queued", "running")


def _row(job: "JobRecord") -> tuple[Any, ...]:
    place: Any = job.place.position
    if job.place.standing == "delayed":
        place = f"in {duration(max((job.place.retry_at_ms or 0) - job.read_ms, 0) / 1000)}"
    elif job.place.standing == "parked":
        place = "parked"
    age = duration(job.age_s)
    return job.public_id, job.model, job.state, job.lane, job.tenant, place, job.n, age, job.attempt, job.worker


def _print_record(record: "JobRecord", document: dict[str, Any]) -> None:
    import json

    for name, value in document.items():
        if name in ("object", "attempts", "spec") or value is None:
            continue
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        print(f"{name:<13} {printable(shown)}")
    if record.attempts:
        print()
        rows = [
            (a.number, a.worker, document["attempts"][i]["started_at"], _took(record, i), a.outcome or "runs")
            for i, a in enumerate(record.attempts)
        ]
        print_table(("attempt", "worker", "started", "took", "outcome"), rows)
    if "spec" in document:
        print()
        spec = document["spec"]
        print(
            "The spec is gone: it is kept while the job may be tried again."
            if spec is None
            else json.dumps(spec, indent=2, ensure_ascii=False)
        )


def _took(record: "JobRecord", index: int) -> str | None:
    attempt = record.attempts[index]
    return duration(((attempt.ended_ms or record.read_ms) - attempt.started_ms) / 1000)
