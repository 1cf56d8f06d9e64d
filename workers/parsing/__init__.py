"""Tells reasoning and tool calls from content, in what a model writes. Knows no torch and no tokenizer.

``formats.toml`` has a row for each format under the name of vLLM's parser; ``formats.py`` reads it. A row names one of
a few forms: ``json_form``, ``named_form``, ``xml_form``, ``python_form``, ``loose_form``, ``harmony``; each reads its
calls from a ``reader`` and describes them as a grammar, for calls that must come. ``answer`` puts the parts together.
"""

from .answer import Answer, Format, format_of
from .parts import Parser, Parts

__all__ = ["Answer", "Format", "Parser", "Parts", "format_of"]
