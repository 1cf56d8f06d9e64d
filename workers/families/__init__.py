"""What is known of families of models, as data: rows in TOML, chat templates in Jinja. No torch, no transformers."""

from .choice import Choice, choose, detect
from .row import Family, families, read_rows

__all__ = ["Choice", "Family", "choose", "detect", "families", "read_rows"]
