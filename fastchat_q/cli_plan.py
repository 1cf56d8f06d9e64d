"""How ``fastchat-q plan`` shows what it found."""

from typing import Any

from .cli_common import print_table, say


def size(count: int | None) -> str | None:
    """``1.2 GiB``; what is smaller than a tenth of one in MiB or KiB."""
    if count is None:
        return None
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit / 10:
            return f"{count / unit:.2f} {name}"
    return f"{count / 2**10:.1f} KiB"


def show(plan: dict[str, Any]) -> None:
    """The tables of a plan; the advice on stderr is the last line."""
    rows = [
        ("model", plan["model"]),
        ("architecture", plan["architecture"]),
        ("parameters", f"{plan['parameters']:,}"),
        ("checkpoint", size(plan["stored"])),
        ("context length", plan["context_length"]),
        ("KV cache per token", size(plan["cache_per_token"]) if plan["cache_per_token"] is not None else "unknown"),
        *((f"free on {place['name']}", f"{size(place['free'])} of {size(place['total'])}") for place in plan["places"]),
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
    sizes = (size(variant[name]) for name in ("weights", "cache", "working", "total"))
    return (variant["dtype"], variant["quantization"], *sizes, variant["fits_on"] or "does not fit")
