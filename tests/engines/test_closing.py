"""JSON that would be cut off is brought to its end: by a short way, in time, and by the same one if it is resumed."""

import json
from typing import Any

import jsonschema
import numpy as np
import pytest
from fastchat_q.workers.engines.loading.model import Loaded
from fastchat_q.workers.engines.processing.closing import LEAST, LONGEST
from fastchat_q.workers.engines.processing.structured import Guides
from pydantic import BaseModel, TypeAdapter

from fastchat_q.jobs import Guide

from .test_structured import NAME, SCHEMAS, closed


class Leaf(BaseModel):
    name: str
    number: int


class Node(BaseModel):
    """Each one that is begun takes many tokens to its end."""

    left: Leaf
    right: Leaf
    below: list["Node"]


ENDLESS: dict[str, Any] = {
    "text": {"type": "string"},
    "texts": {"type": "array", "items": {"type": "string"}},
    "nodes": TypeAdapter(list[Node]).json_schema(),
    "object": {"type": "object"},
    "pattern": closed(a={"type": "string", "pattern": "^[0-9a-f]+-[xyz]+$"}),
    "formats": closed(e={"type": "string", "format": "email"}, u={"type": "string", "format": "uri"}),
    "required": closed(**{f"f{number}": {"type": "string"} for number in range(40)}),
    "search": {"type": "string", "pattern": "foo"},
    "ends": closed(a={"type": "string", "pattern": "^a.*z$"}, b={"type": "string", "pattern": "^(x.*foo|y.*bar)$"}),
    "escapes": {"type": "string", "pattern": r'"x\\y"'},
    "classes": {"type": "string", "pattern": r"(foo|bar)\d{3}@[^a-z]+\.com$"},
    "least": closed(a={"type": "string", "minLength": 15}, b={"type": "array", "items": NAME, "minItems": 3}),
}


@pytest.fixture
def guides(tiny: Loaded) -> Guides:
    return Guides(tiny.tokenizer, len(tiny.tokenizer), tiny.eos_ids)


def way(guides: Guides, schema: Any, most: int = LONGEST) -> list[int] | None:
    compiled = guides.guided(Guide(kind="json_schema", value=json.dumps(schema)), most)._compiled.result()
    return None if compiled.closing is None else compiled.closing.way(compiled.matcher, most)


@pytest.mark.parametrize("name", [*SCHEMAS, *ENDLESS])
def test_from_the_beginning_there_is_a_way_to_a_short_answer(tiny: Loaded, guides: Guides, name: str) -> None:
    schema = (SCHEMAS | ENDLESS)[name]
    found = way(guides, schema)
    assert found is not None
    *ids, end = found
    assert end in tiny.eos_ids
    jsonschema.Draft202012Validator(schema).validate(json.loads(tiny.tokenizer.decode(ids)))
    assert way(guides, schema, len(found) - 1) is None
    assert way(guides, schema, len(found)) == found


def said(tiny: Loaded, guides: Guides, schema: Any, limit: int, seed: int, begun: list[int]) -> list[int]:
    """An answer of a model that says anything its guide allows; ``begun``: what it said before it was interrupted."""
    guided = guides.guided(Guide(kind="json_schema", value=json.dumps(schema)), limit)
    assert guided._compiled.result()
    size, ids = len(tiny.tokenizer), list(begun)
    bits = np.zeros((size + 31) // 32 * 4, np.uint8)
    while len(ids) < limit and (not ids or ids[-1] not in tiny.eos_ids):
        guided.fill(bits, ids)
        assert guided.failure is None
        allowed = np.flatnonzero(np.unpackbits(bits, count=size, bitorder="little"))
        ends = np.isin(allowed, list(tiny.eos_ids))
        allowed = allowed if ends.all() else allowed[~ends]  # it never ends by itself
        ids.append(int(np.random.default_rng((seed, len(ids))).choice(allowed)))
    return ids


@pytest.mark.parametrize("name", ENDLESS)
def test_a_model_that_says_anything_ends_within_its_limit(tiny: Loaded, guides: Guides, name: str) -> None:
    schema = ENDLESS[name]
    shortest = len(way(guides, schema) or ())
    for seed, limit in enumerate((shortest, shortest + 3, 120, 200, 301, 500)):
        if limit < shortest:
            continue
        *ids, end = said(tiny, guides, schema, limit, seed, [])
        assert end in tiny.eos_ids, (name, limit)
        jsonschema.Draft202012Validator(schema).validate(json.loads(tiny.tokenizer.decode(ids)))


def test_an_answer_that_is_resumed_takes_the_same_course(tiny: Loaded, guides: Guides) -> None:
    whole = said(tiny, guides, ENDLESS["nodes"], 300, 7, [])
    assert len(whole) > 100
    for cut in range(1, len(whole), LEAST // 2):
        assert said(tiny, guides, ENDLESS["nodes"], 300, 7, whole[:cut]) == whole


def test_an_end_that_was_not_found_at_first_is_found_later(tiny: Loaded, guides: Guides) -> None:
    schema = {"type": "string", "minLength": 3000}
    assert way(guides, schema) is None
    begun = tiny.tokenizer.encode('"' + "ab" * 1450, add_special_tokens=False)
    *ids, end = said(tiny, guides, schema, len(begun) + 400, 1, begun)
    assert end in tiny.eos_ids
    assert len(json.loads(tiny.tokenizer.decode(ids))) >= 3000


def test_where_no_end_fits_the_model_goes_on_as_it_likes(tiny: Loaded, guides: Guides) -> None:
    schema = {"type": "string", "minLength": 10_000}
    assert way(guides, schema) is None
    assert len(said(tiny, guides, schema, 100, 1, [])) == 100
