"""What another version wrote: its additional fields are left out, so that processes can be upgraded one by one."""

import dataclasses
from collections.abc import Mapping
from typing import Any


def known_fields(cls: type[Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``raw`` that are fields of the dataclass ``cls``."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in raw.items() if name in names}
