"""KV memory: rows come and go, grow and fork, and never take more than they may; prefixes are known by their text."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastchat_q.workers.engines.batching import kv, prefixes
from fastchat_q.workers.engines.batching.kv import KVStore, LayerShape, Place, Shapes
from fastchat_q.workers.engines.batching.prefixes import BLOCK, Prefixes

SHAPES: Shapes = (
    LayerShape(2, 4, 2, 4, torch.float32, torch.device("cpu")),
    None,
    LayerShape(1, 3, 1, 5, torch.float32, torch.device("cpu"), window=8),
)


def write(place: Place, mark: float, columns: int) -> None:
    """Fills a row up to so many columns, each with a number of its own."""
    for layer, tensors in enumerate(place.slab.layers()):
        for i, tensor in enumerate(tensors):
            values = mark + layer * 10_000 + i * 5_000 + torch.arange(columns) / 1000
            tensor[place.index, :, :columns] = values[None, :, None]
    place.length = columns


def check(place: Place, mark: float) -> None:
    for layer, tensors in enumerate(place.slab.layers()):
        for i, tensor in enumerate(tensors):
            expected = mark + layer * 10_000 + i * 5_000 + torch.arange(place.length) / 1000
            found = tensor[place.index, :, : place.length]
            assert torch.equal(found, expected.to(found.dtype)[None, :, None].expand_as(found))


def test_rows_keep_what_they_hold_whatever_others_do() -> None:
    chance = random.Random(0)
    store = KVStore(SHAPES, 20_000)
    rows: dict[int, Place] = {}
    refused = 0
    for mark in range(400):
        refused += not _act(chance, store, rows, mark)
        assert store.allocated <= store.budget
        for name, place in rows.items():
            if mark % 10 == 0:
                check(place, name)
            assert place.slab.places[place.index] is place
    assert refused > 10, "the limit was reached"
    for place in rows.values():
        store.free(place)
    store.trim()
    assert store.allocated == 0


def _act(chance: random.Random, store: KVStore, rows: dict[int, Place], mark: int) -> bool:
    """Does something to a store; False: it had no room for it."""
    action = chance.random()
    if action < 0.4:
        columns = chance.choice([3, 60, 65, 200, 900, 1500, 3000])
        place = store.take(columns + 1, alone=chance.random() < 0.2)
        if place is None:
            return False
        write(place, mark, columns)
        rows[mark] = place
    elif rows:
        name = chance.choice(list(rows))
        place = rows[name]
        if action < 0.6:
            store.free(rows.pop(name))
        elif action < 0.9:
            if not store.fit(place, place.length + chance.choice([1, 70, 600])):
                return False
            assert place.columns > place.length
        else:
            copy = store.fork(place, place.length + 1)
            if copy is None:
                return False
            check(copy, name)
            store.free(copy)
    if chance.random() < 0.05:
        store.trim()
    return True


def test_rows_keep_what_they_hold_when_memory_ends_in_the_middle_of_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    chance, failed = random.Random(1), 0

    def zeros(*args: Any, **kwargs: Any) -> torch.Tensor:
        if chance.random() < 0.05:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(*args, **kwargs)

    monkeypatch.setattr(kv, "torch", SimpleNamespace(zeros=zeros))
    store = KVStore(SHAPES, 20_000)
    rows: dict[int, Place] = {}
    for mark in range(600):
        try:
            _act(chance, store, rows, mark)
        except torch.OutOfMemoryError:
            failed += 1
        for name, place in rows.items():
            check(place, name)
            assert place.slab.places[place.index] is place
            assert place.index < place.slab.rows
            assert all(keys.shape[0] >= place.slab.rows for keys, _ in place.slab.layers())
            assert all(keys.shape[2] >= place.columns for keys, _ in place.slab.layers())
    assert failed > 20
    monkeypatch.undo()
    for slab in store.shared.values():
        assert slab.held >= slab.rows
    store.trim()
    assert all(slab.held == len(slab.places) for slab in store.shared.values())


def test_prefixes_that_were_cleared_when_memory_ended_are_kept_again(monkeypatch: pytest.MonkeyPatch) -> None:
    store = KVStore(SHAPES, 20_000)
    known = Prefixes(SHAPES, BLOCK * store.bytes_per_column * 400)
    place = store.take(200 * BLOCK)
    assert place is not None
    ids = list(range(100 * BLOCK))
    write(place, 7, len(ids))
    known.save("", ids[: 10 * BLOCK], place)

    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs["device"] == SHAPES[0].device and args[1] == SHAPES[2].heads:  # the first layer has grown by then
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.empty(*args, **kwargs)

    monkeypatch.setattr(prefixes, "torch", SimpleNamespace(empty=empty, tensor=torch.tensor))
    with pytest.raises(torch.OutOfMemoryError):
        known.save("", ids, place)
    known.clear()
    monkeypatch.undo()
    known.save("", ids, place)
    again = store.take(len(ids) + 1)
    assert again is not None
    again.length = known.load("", [*ids, 0], again)
    assert again.length == len(ids)
    check(again, 7)


def test_a_long_row_takes_no_room_of_short_ones() -> None:
    store = KVStore(SHAPES, 10_000)
    places = [store.take(50) for _ in range(8)]
    long = store.take(4000)
    assert long is not None
    assert all(place is not None and place.columns == kv.SMALLEST for place in places)
    assert store.allocated == 8 * kv.SMALLEST + long.columns


def test_a_row_of_all_the_memory_fits_when_it_is_alone() -> None:
    store = KVStore(SHAPES, 1000)
    place = store.take(1000)
    assert place is not None
    assert place.columns == 1000
    assert store.take(1) is None
    store.free(place)
    assert store.take(1) is not None


@pytest.mark.parametrize("limit", [4, 40])
def test_prefixes_give_back_what_was_saved_for_the_same_text_and_namespace_only(limit: int) -> None:
    store = KVStore(SHAPES, 20_000)
    per_block = BLOCK * store.bytes_per_column
    known = Prefixes(SHAPES, per_block * limit)
    ids = list(range(3 * BLOCK + 5))
    source = store.take(len(ids))
    assert source is not None
    write(source, 7, len(ids))
    known.save("", ids, source)
    assert len(known) == 3
    for namespace, text, tokens in [
        ("", ids, 3 * BLOCK),
        ("", ids[: 3 * BLOCK], 2 * BLOCK),  # the last token is always computed: its logits are wanted
        ("", [*ids[: BLOCK + 1], 1, *ids[BLOCK + 2 :]], BLOCK),
        ("", [1, *ids], 0),
        ("adapter", ids, 0),
    ]:
        place = store.take(len(text))
        assert place is not None
        place.length = known.load(namespace, text, place)
        assert place.length == tokens
        check(place, 7)
        store.free(place)


def test_the_least_recently_used_prefixes_go_first_and_ends_before_beginnings() -> None:
    store = KVStore(SHAPES, 20_000)
    known = Prefixes(SHAPES, BLOCK * store.bytes_per_column * 4)
    place = store.take(9 * BLOCK)
    assert place is not None

    def save(first: int, blocks: int) -> None:
        ids = [first + i for i in range(blocks * BLOCK)]
        write(place, first, len(ids))
        known.save("", ids, place)

    def loads(first: int, blocks: int) -> int:
        return known.load("", [first + i for i in range(blocks * BLOCK + 1)], place) // BLOCK

    save(1000, 3)
    save(2000, 1)
    assert (loads(1000, 3), loads(2000, 1)) == (3, 1)
    save(3000, 1)  # the end of the oldest text gives way
    assert loads(1000, 3) == 2
    assert (loads(2000, 1), loads(3000, 1)) == (1, 1)
    save(4000, 9)
    assert loads(4000, 9) == 4, "of a text that is too long, the beginning is kept"
    assert len(known) == 4


def test_prefixes_without_memory_keep_nothing() -> None:
    store = KVStore(SHAPES, 1000)
    known = Prefixes(SHAPES, 0)
    place = store.take(2 * BLOCK)
    assert place is not None
    write(place, 1, 2 * BLOCK)
    known.save("", list(range(2 * BLOCK)), place)
    assert known.load("", list(range(2 * BLOCK)), place) == 0
    assert prefixes._names("", list(range(BLOCK - 1))) == []
