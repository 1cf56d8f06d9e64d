"""What a job asks for that the server behind does not have: refused by name, never dropped."""

from collections.abc import Collection

from fastchat_q.errors import InvalidRequestError
from fastchat_q.jobs import CONTINUE, Job


def asked(job: Job) -> set[str]:
    """The parameters with which a job asks for something, but those that every server has."""
    found = set(job.asks())
    if job.sampling.ignore_eos:
        found.add("ignore_eos")
    if job.sampling.seeded:
        found.add("seed")
    if job.tools and job.tool_choice not in ("auto", "none"):
        found.add("tool_choice")
    if job.tools and job.tool_choice != "none" and not job.parallel_tool_calls:
        found.add("parallel_tool_calls")
    if job.echo:
        found.add("echo")
    if job.kind == "completion" and job.special_tokens is False:
        found.add("add_special_tokens")
    if job.template_kwargs.keys() - {"reasoning_effort", CONTINUE}:
        found.add("chat_template_kwargs")
    return found


def refuse(job: Job, names: Collection[str], whose: str) -> None:
    """Refuses a job that sets one of these parameters, which the server does not have.

    Raises:
        InvalidRequestError: it does.
    """
    for name in sorted(asked(job).intersection(names)):
        raise unsupported(name, f"{whose} has no parameter '{name}'.")


def thinking_of(job: Job, whose: str) -> tuple[str | None, bool | None]:
    """``reasoning_effort`` and ``enable_thinking``, for an API without chat templates.

    Raises:
        InvalidRequestError: the job has other arguments for one.
    """
    rest = dict(job.template_kwargs)
    effort = rest.pop("reasoning_effort", None)
    thinking = rest.pop("enable_thinking", None)
    if not isinstance(effort, str | None):
        raise unsupported("reasoning_effort", f"{whose} takes a word for reasoning_effort, not {effort!r}.")
    if rest or not isinstance(thinking, bool | None):
        name = next(iter(rest), "enable_thinking")
        raise unsupported(
            "chat_template_kwargs",
            f"{whose} has no chat template: {name!r} means nothing to it, only reasoning_effort, and enable_thinking "
            "as true or false.",
        )
    return effort, thinking


def unsupported(name: str, message: str) -> InvalidRequestError:
    """What is told of such a parameter."""
    return InvalidRequestError(message, param=name, code="unsupported_parameter")
