"""The storage of files: a folder, a bucket where one is named (TEST_S3_URL), and what both promise."""

import asyncio
import errno
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from ulid import ULID

from fastchat_q.errors import ConfigurationError, StorageUnavailableError
from fastchat_q.storage import AlreadyExistsError, MissingObjectError, Storage

MIB = 2**20


@pytest.fixture(params=["folder", "memory", "s3"])
def storage(request: pytest.FixtureRequest, folder: Path) -> Storage:
    """An empty one."""
    if request.param == "folder":
        return Storage(f"file://{folder}/not made yet")
    if request.param == "memory":
        return Storage("memory://")
    bucket = os.environ.get("TEST_S3_URL")
    if bucket is None:
        pytest.skip("TEST_S3_URL names no bucket (docs/files.md)")
    return Storage(f"{bucket}/{ULID()}")


async def pieces(number: int, size: int = 65536, fail_at: int | None = None) -> AsyncIterator[bytes]:
    for index in range(number):
        if index == fail_at:
            raise RuntimeError("the client hung up")
        yield bytes([index % 256]) * size


async def keys_of(storage: Storage, prefix: str = "a") -> list[str]:
    return sorted([key async for key, _ in storage.list(prefix)])


def files_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


async def test_a_stream_is_stored_and_comes_back(storage: Storage) -> None:
    whole = b"".join([piece async for piece in pieces(200)])
    assert await storage.put("a/b", pieces(200)) == len(whole)
    assert await storage.size("a/b") == len(whole)
    assert await storage.get("a/b") == whole
    assert b"".join([piece async for piece in storage.stream("a/b")]) == whole
    assert b"".join([piece async for piece in storage.stream("a/b", MIB)]) == whole[MIB:]
    assert [entry async for entry in storage.list("a")] == [("a/b", len(whole))]


async def test_a_range_ends_where_the_object_does(storage: Storage) -> None:
    await storage.put("a/b", b"12345")
    await storage.put("a/empty", b"")
    assert await storage.get_range("a/b", 1, 2) == b"23"
    assert await storage.get_range("a/b", 3, 10) == b"45"
    assert await storage.get_range("a/b", 3, 0) == b""
    assert await storage.get_range("a/b", 5, 1) == b""
    assert await storage.get_range("a/empty", 0, 10) == b""
    assert [piece async for piece in storage.stream("a/b", 5)] == []
    assert b"".join([piece async for piece in storage.stream("a/empty")]) == b""


async def test_a_stream_that_fails_leaves_nothing(storage: Storage, folder: Path) -> None:
    await storage.put("a/b", b"before")
    with pytest.raises(RuntimeError, match="hung up"):
        await storage.put("a/b", pieces(200, fail_at=150))
    with pytest.raises(RuntimeError, match="hung up"):
        await storage.put("a/c", pieces(200, fail_at=150))
    assert await storage.get("a/b") == b"before"
    assert await keys_of(storage) == ["a/b"]
    assert len(files_under(folder)) <= 1


async def test_a_put_that_is_cancelled_leaves_nothing(folder: Path) -> None:
    storage, waits = Storage(f"file://{folder}"), asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield bytes(6 * MIB)
        waits.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(storage.put("a/b", endless()))
    await waits.wait()
    assert [name for name in files_under(folder) if name.startswith("partial/")]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(10):
        while files_under(folder):
            await asyncio.sleep(0.01)  # its thread removes it


async def test_of_many_that_create_one_object_one_does(storage: Storage) -> None:
    async def create(number: int) -> int | None:
        try:
            await storage.put("a/b", b"%d" % number, create=True)
        except AlreadyExistsError:
            return None
        return number

    [winner] = [done for done in await asyncio.gather(*map(create, range(20))) if done is not None]
    assert await storage.get("a/b") == b"%d" % winner
    with pytest.raises(AlreadyExistsError):
        await storage.put("a/b", pieces(3), create=True)
    assert await keys_of(storage) == ["a/b"]


async def test_what_is_not_there_is_said_so(storage: Storage) -> None:
    assert await storage.size("a/b") is None
    assert await keys_of(storage) == []
    with pytest.raises(MissingObjectError):
        await storage.get("a/b")
    with pytest.raises(MissingObjectError):
        await storage.get_range("a/b", 0, 1)
    with pytest.raises(MissingObjectError):
        await anext(storage.stream("a/b"))


async def test_deleting_passes_over_what_is_gone(storage: Storage) -> None:
    for name in ("a/b", "a/c", "a/d"):
        await storage.put(name, b"1")
    await storage.delete(["a/b", "a/never", "a/c"])
    await storage.delete([])
    assert await keys_of(storage) == ["a/d"]


def test_an_object_is_on_disk_before_it_has_its_name(folder: Path) -> None:
    """The order of system calls: synced, renamed, then its folder synced, and so is each folder above that is new."""
    program = (
        "import asyncio, sys; from fastchat_q.storage import Storage\n"
        "asyncio.run(Storage('file://' + sys.argv[1]).put('a/b/c', b'1', create=sys.argv[2] == 'create'))"
    )
    for mode in ("overwrite", "create"):
        log = folder / f"{mode}.calls"
        calls = "trace=fsync,rename,renameat,renameat2,link,linkat"
        command = ["strace", "-f", "-y", "-e", calls, "-o", str(log), sys.executable, "-c", program]
        try:
            done = subprocess.run([*command, str(folder / mode), mode], capture_output=True, text=True, timeout=60)
        except FileNotFoundError:
            pytest.skip("strace is not installed")
        if "ptrace" in done.stderr.lower():
            pytest.skip("tracing is not allowed here")
        assert done.returncode == 0, done.stderr
        lines = log.read_text().splitlines()
        named = next(i for i, line in enumerate(lines) if f'{mode}/a/b/c"' in line)
        assert any("fsync" in line and "/partial/" in line for line in lines[:named]), lines
        after = [line.partition("<")[2].partition(">")[0] for line in lines[named:] if "fsync(" in line]
        assert after == [f"{folder}/{mode}/a/b", f"{folder}/{mode}/a", f"{folder}/{mode}"]


async def test_leftovers_of_dead_processes_go_when_they_are_old(folder: Path) -> None:
    storage = Storage(f"file://{folder}")
    await storage.put("a/b", b"1")
    (folder / "partial" / "old#1").write_bytes(b"half")
    (folder / "partial" / "young#1").write_bytes(b"half")
    os.utime(folder / "partial" / "old#1", (0, 0))
    assert await storage.remove_partial(3600) == 1
    assert files_under(folder) == ["a/b", "partial/young#1"]


async def test_a_folder_that_cannot_be_is_found_out_when_it_is_needed(folder: Path) -> None:
    (folder / "file").write_text("")
    storage = Storage(f"file://{folder}/file/below")
    for attempt in (storage.put("a", b""), storage.get("a"), storage.size("a"), storage.delete(["a"])):
        with pytest.raises(StorageUnavailableError):
            await attempt


@pytest.mark.parametrize("url", ["nonsense", "ftp://host/x", "s3://", "/a/folder", "file:relative", "file://relative"])
def test_a_url_that_cannot_be_used_is_refused_at_start(url: str) -> None:
    with pytest.raises(ConfigurationError, match="FASTCHAT_Q_STORAGE_URL"):
        Storage(url)


def test_a_full_disk_is_told_from_other_trouble(folder: Path) -> None:
    program = (
        "import asyncio, contextlib\n"
        "from fastchat_q.errors import StorageFullError\n"
        "from fastchat_q.storage import Storage\n"
        f"storage = Storage('file://{folder}')\n"
        "async def many():\n"
        "    for _ in range(64): yield bytes(2**20)\n"
        "async def main():\n"
        "    for data in (bytes(2**23), many()):\n"
        "        try: await storage.put('a/b', data)\n"
        "        except StorageFullError as error: print('full', error.status)\n"
        "    async with asyncio.timeout(20):\n"
        "        while True:\n"  # a thread of obstore may still hold what was refused
        "            with contextlib.suppress(StorageFullError):\n"
        "                await storage.put('a/small', b'1')\n"
        "                break\n"
        "            await asyncio.sleep(0.05)\n"
        "    print([key async for key, _ in storage.list('a')])\n"
        "asyncio.run(main())"
    )
    mount = f'mount -t tmpfs -o size=2m tmpfs {folder} && exec {sys.executable} -c "$0"'
    try:
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", mount, program], capture_output=True, text=True, timeout=60
        )
    except OSError as error:
        pytest.skip(f"no unshare: {os.strerror(error.errno or errno.ENOENT)}")
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr}")
    said = [line for line in done.stdout.splitlines() if "storage is full" not in line]
    assert said == ["full 507", "full 507", "['a/small']"], done.stderr
