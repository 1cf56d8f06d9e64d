"""``fastchat-q dead``: jobs that nobody could finish. Why they died, and another life or the end for them."""

from typing import TYPE_CHECKING, Annotated

import typer

from .cli_common import (
    EXIT_FAILED,
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
from .cli_jobs import OneModel, ShowSpec, models, no_such_job, show_job

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from redis.asyncio import Redis

    from .overview import DeadLetter
    from .settings import Settings

BATCH = 64
"""Dead jobs that are retried or dropped in one round trip."""

DeadIds = Annotated[list[str] | None, typer.Argument(metavar="[ID...]", help="<slug>.<ULID>, or the ULID alone.")]
All = Annotated[bool, typer.Option("--all", help="All of one model: needs --model.")]

app = typer.Typer(name="dead", help="Dead letters: look, retry, drop.", no_args_is_help=True, rich_markup_mode=None)


@app.command("ls")
def list_dead(
    model: OneModel = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=10_000, help="For each model.")] = 50,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
    state_dir: StateDir = None,
) -> None:
    """Dead jobs, newest first. Models that nobody serves for a day are to be named with --model."""
    settings = load_settings(redis_url=redis_url, state_dir=state_dir)

    async def read(redis: "Redis") -> "tuple[list[DeadLetter], bool]":
        from .overview import dead_letters

        letters: list[DeadLetter] = []
        truncated = False
        for name in await models(redis, model):
            count = 0
            async for letter in dead_letters(redis, name):
                count += 1
                if count > limit:
                    truncated = True
                    break
                letters.append(letter)
        return letters, truncated

    letters, truncated = with_redis(settings, read)
    if as_json:
        print_json({"object": "list", "data": [letter.to_dict() for letter in letters], "truncated": truncated})
        return
    rows = []
    from .records import iso

    for letter in letters:
        job, died = letter.record, iso(letter.died_ms)
        rows.append((job.public_id, job.model, job.tenant, died, job.deaths, job.retries, job.last_worker, job.reason))
    print_table(("id", "model", "tenant", "died", "deaths", "retries", "last worker", "reason"), rows)
    if truncated:
        say(f"There are more. See further with --limit (now {limit}) or --model.")


@app.command()
def show(
    job: Annotated[str, typer.Argument(metavar="ID", help="<slug>.<ULID>, or the ULID alone.")],
    spec: ShowSpec = False,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
    state_dir: StateDir = None,
) -> None:
    """One dead job: its record and its attempts."""
    show_job(load_settings(redis_url=redis_url, state_dir=state_dir), job, spec, as_json, only_state="dead")


@app.command()
def retry(
    jobs: DeadIds = None,
    everything: All = False,
    model: OneModel = None,
    edit: Annotated[bool, typer.Option("--edit", help="Change the job in $EDITOR first; it starts over.")] = False,
    spec: Annotated[
        typer.FileText | None, typer.Option("--spec", help="Take this file for the job instead; - is stdin.")
    ] = None,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
    state_dir: StateDir = None,
) -> None:
    """Another life for dead jobs, with counters at zero, behind their last token."""
    settings = load_settings(redis_url=redis_url, state_dir=state_dir)
    _check_choice(jobs, everything, model)
    if edit and spec is not None:
        fail("--edit and --spec exclude each other.", EXIT_USAGE)
    if (edit or spec is not None) and (everything or len(jobs or ()) != 1):
        fail("--edit and --spec take exactly one ID.", EXIT_USAGE)
    text = spec.read() if spec is not None else None
    kept: Path | None = None
    replacement = ""
    if jobs and (edit or text is not None):
        from .cli_edit import edited, validated

        [wanted] = jobs
        name, job_id, before = with_redis(settings, lambda redis: _spec_of(redis, wanted))
        jobs = [f"{name}.{job_id}"]
        if text is not None:
            replacement = validated(before, text)
        else:
            replacement, kept = edited(f"{name}.{job_id}", before)

    async def again(redis: "Redis", name: str, job_ids: list[str]) -> list[bool]:
        from .operations import revive

        return await revive(
            redis,
            name,
            job_ids,
            queue_deadline_s=settings.queue_deadline_s,
            deadline_s=settings.deadline_s,
            keep_s=settings.result_ttl_s,
            spec=replacement,
        )

    try:
        _report(_apply(settings, jobs, model, again), "retried", as_json)
    except typer.Exit:
        if kept is not None:
            say(f"Your text is in {kept}.")
        raise
    if kept is not None:
        kept.unlink()


@app.command()
def drop(
    jobs: DeadIds = None,
    everything: All = False,
    model: OneModel = None,
    yes: Annotated[bool, typer.Option("--yes", help="Really all of them.")] = False,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
    state_dir: StateDir = None,
) -> None:
    """Forget dead jobs, with their tokens."""
    settings = load_settings(redis_url=redis_url, state_dir=state_dir)
    _check_choice(jobs, everything, model)
    if everything and not yes:
        fail(f"drop --all forgets every dead job of {model!r} for ever: say --yes.", EXIT_USAGE)

    async def forget(redis: "Redis", name: str, job_ids: list[str]) -> list[bool]:
        from .operations import drop

        return await drop(redis, name, job_ids)

    _report(_apply(settings, jobs, model, forget), "dropped", as_json)


def _check_choice(jobs: list[str] | None, everything: bool, model: str | None) -> None:
    if everything == bool(jobs):
        fail("Give either IDs, or --all --model MODEL. See them: fastchat-q dead ls", EXIT_USAGE)
    if everything and model is None:
        fail("--all needs --model MODEL. See the models: fastchat-q queue ls", EXIT_USAGE)


async def _spec_of(redis: "Redis", job: str) -> tuple[str, str, bytes]:
    """(slug, bare id, spec) of a dead job."""
    from .keys import slug
    from .overview import find_job
    from .records import read_record

    found = await find_job(redis, job)
    record = await read_record(redis, *found, whole=True) if found else None
    if record is None:
        fail(no_such_job(job), EXIT_NOT_FOUND)
    if record.state != "dead" or record.spec is None:
        fail(f"{record.public_id} is not dead, it is {record.state}: nothing was changed.", EXIT_NOT_FOUND)
    return slug(record.model), record.id, record.spec


def _apply(
    settings: "Settings",
    jobs: list[str] | None,
    model: str | None,
    action: "Callable[[Redis, str, list[str]], Awaitable[list[bool]]]",
) -> dict[str, bool]:
    """Does ``action`` to the jobs, or to all dead ones of the model; for each id, whether it was dead."""

    async def run(redis: "Redis") -> dict[str, bool]:
        from .keys import public_job_id
        from .overview import dead_letters, find_job

        done: dict[str, bool] = {}
        for job in jobs or ():
            found = await find_job(redis, job)
            done[public_job_id(*found) if found else job] = bool(
                found and (await action(redis, found[0], [found[1]]))[0]
            )
        if jobs or model is None:
            return done
        [name] = await models(redis, model)
        ids = [letter.record.id async for letter in dead_letters(redis, name)]
        for start in range(0, len(ids), BATCH):
            some = ids[start : start + BATCH]
            for job_id, ok in zip(some, await action(redis, name, some), strict=True):
                done[public_job_id(name, job_id)] = ok
        return done

    return with_redis(settings, run)


def _report(done: dict[str, bool], what: str, as_json: bool) -> None:
    if as_json:
        print_json({"object": "list", "data": [{"id": job, what: ok} for job, ok in done.items()]})
    else:
        for job, ok in done.items():
            if ok:
                print(f"{job} {what}")
        if not done:
            say("No dead jobs there.")
    for job, ok in done.items():
        if not ok:
            say(f"fastchat-q: {job}: no dead job of that id, nothing was done. See them: fastchat-q dead ls")
    if not all(done.values()):
        raise typer.Exit(EXIT_NOT_FOUND if not any(done.values()) else EXIT_FAILED)
