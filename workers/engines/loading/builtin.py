"""Where the built-in models lie inside the package. It needs no library: engines of any environment may ask."""

from pathlib import Path

from fastchat_q.models import BUILTIN

BUILTIN_DIRS = {name: Path(__file__).parent.parent / name / "model" for name in BUILTIN}
