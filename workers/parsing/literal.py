"""Literals of Python, or of JSON, as JSON."""

import ast
import json
from typing import Any

from .reader import NotACall

WORDS = {"true": True, "false": False, "null": None}


def to_json(source: str) -> str:
    """JSON text of a literal.

    Raises:
        NotACall: it is none.
    """
    source = source.strip()
    try:
        json.loads(source, parse_constant=refuse)
        return source
    except (ValueError, RecursionError):
        pass
    try:
        found = _literal(ast.parse(source.replace("\n", "\\n"), mode="eval").body)
        return json.dumps(found, ensure_ascii=False, allow_nan=False)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError, OverflowError):
        raise NotACall from None


def _literal(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() | int() | float() | bool() | None):
            return node.value
        case ast.Name(id=word) if word in WORDS:
            return WORDS[word]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {_key(key): _literal(item) for key, item in zip(keys, values, strict=True)}
    raise ValueError


def _key(node: ast.expr | None) -> str:
    key = _literal(node) if node is not None else None
    return key if isinstance(key, str) else json.dumps(key)


def refuse(name: str) -> Any:
    """For ``json.loads``: NaN and the infinities are no JSON."""
    raise ValueError(name)
