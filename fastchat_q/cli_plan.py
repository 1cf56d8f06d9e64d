"""How ``fastchat-q plan`` shows what it found."""

from typing import Any

from .cli_common import print_table, say
from .sizes import in_words


def show(plan: dict[str, Any]) -> None:
    """The tables of a plan; the advice on stderr is the last line."""
    rows = [
        ("model", plan["model"]),
        ("architecture", plan["architecture"]),
        ("parameters", f"{plan['parameters']:,}"),
        ("checkpoint", _size(plan["stored"])),
        ("context length", plan["context_length"]),
        ("KV cache per token", _size(plan["cache_per_token"]) if plan["cache_per_token"] is not None else "unknown"),
        *(
            (f"free on {place['name']}", f"{_size(place['free'])} of {_size(place['total'])}")
            for place in plan["places"]
        ),
    ]
    print_table(("what", "figure"), rows)
    print()
    columns = (
        "dtype",
        "quantization",
        "weights",
        f"cache {plan['slots']} x {plan['tokens']}",
        "working",
        "total",
        "fits on",
    )
    asked = plan["asked"]
    print_table(columns, [_row(asked), *(_row(other) for other in plan["others"])])
    print()
    say(plan["advice"])


def _row(variant: dict[str, Any]) -> tuple[Any, ...]:
    sizes = (_size(variant[name]) for name in ("weights", "cache", "working", "total"))
    return (variant["dtype"], variant["quantization"], *sizes, variant["fits_on"] or "does not fit")


def _size(count: int | None) -> str | None:
    return None if count is None else in_words(count)
