"""The Files API over real HTTP, with the official client and with requests that it would never send."""

import contextlib
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError

from fastchat_q import keys, upkeep
from fastchat_q.errors import StorageUnavailableError, UnknownFileError
from fastchat_q.files import Files, new_file_id, object_key
from fastchat_q.storage import Storage

from .http_client import Connection, Reply, get, post
from .servers import free_port, wait_until
from .stack import API_KEY, Stack, running_stack

PATH = "/v1/files"
MIB = 2**20
DAY_S = 24 * 3600
BOUNDARY = "limit"
KEEP = {"anchor": "created_at", "seconds": 3600}


@pytest.fixture(scope="module")
def files_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """An API server that takes files of 1 MiB, and 8 MiB of a tenant."""
    with running_stack(tmp_path_factory.mktemp("fq")) as running:
        running.api.stop()
        running.api = start_api(running, running.port)
        yield running


@pytest.fixture
def client(files_stack: Stack) -> Iterator[openai.OpenAI]:
    """It finds no files, and leaves none."""
    with files_stack.client() as client:
        yield client
        for file in client.files.list():
            client.files.delete(file.id)
        assert stored(files_stack.folder) == []


def start_api(stack: Stack, port: int, **environment: str) -> Any:
    limits = {"FASTCHAT_Q_MAX_FILE_BYTES": str(MIB), "FASTCHAT_Q_MAX_STORED_BYTES": str(8 * MIB)}
    return stack.start_api(port, **{**limits, "FASTCHAT_Q_STALLED_CLIENT_S": "1", **environment})


def stored(folder: Path) -> list[str]:
    """Every file in the storage, those included that are being written."""
    root = folder / "files"
    found = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
    return sorted(name for name in found if name != "storage-id")


def form(*parts: tuple[str, bytes] | bytes, end: bool = True) -> bytes:
    """A form: pairs of a disposition and a value, or a part as it is."""
    lines = []
    for part in parts:
        raw = part if isinstance(part, bytes) else head_of(part[0]) + part[1]
        lines.append(f"--{BOUNDARY}\r\n".encode() + raw + b"\r\n")
    return b"".join(lines) + (f"--{BOUNDARY}--\r\n".encode() if end else b"")


def head_of(disposition: str) -> bytes:
    return f"Content-Disposition: form-data; {disposition}\r\n\r\n".encode()


FILE = ('name="file"; filename="a.jsonl"', b"some bytes")
PURPOSE = ('name="purpose"', b"user_data")
ANCHOR = ('name="expires_after[anchor]"', b"created_at")
SECONDS = ('name="expires_after[seconds]"', b"3600")
FORM = f"multipart/form-data; boundary={BOUNDARY}"


def upload(stack: Stack, body: bytes, content_type: str | None = FORM, **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return post(stack.port, body, path=PATH, headers={"content-type": content_type, **named})


def begin(port: int, *, size: int = 100 * MIB, key: str = API_KEY) -> Connection:
    """An upload that has sent some bytes of its file, and is about to send more."""
    connection = Connection(port)
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-type: {FORM}\r\n"
    body = form(PURPOSE, end=False) + f"--{BOUNDARY}\r\n".encode() + head_of(FILE[0]) + b"x" * 1000
    connection.socket.sendall(f"{head}content-length: {size}\r\n\r\n".encode() + body)
    return connection


def is_writing(folder: Path) -> bool:
    return any((folder / "files" / "partial").glob("*"))


def test_a_file_has_openais_shape_to_the_field(client: openai.OpenAI, files_stack: Stack) -> None:
    now = int(time.time())
    made = client.files.create(file=("über.jsonl", b"{}\n"), purpose="batch")
    body = get(files_stack.port, f"{PATH}/{made.id}").json()
    assert re.fullmatch(r"file-[0-9A-Z]{26}", body.pop("id"))
    created = body.pop("created_at")
    assert now <= created <= now + 60
    assert body == {
        "object": "file",
        "bytes": 3,
        "expires_at": created + 30 * DAY_S,
        "filename": "über.jsonl",
        "purpose": "batch",
        "status": "processed",
        "status_details": None,
    }
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == b"{}\n"
    assert client.files.delete(made.id).model_dump() == {"id": made.id, "object": "file", "deleted": True}
    for gone in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as raised:
            gone(made.id)
        assert raised.value.code == "file_not_found"


@pytest.mark.parametrize("purpose", ["assistants", "batch", "fine-tune", "vision", "user_data", "evals"])
def test_every_purpose_of_openai_is_taken_and_only_batches_expire_by_themselves(
    client: openai.OpenAI, purpose: Any
) -> None:
    made = client.files.create(file=b"bytes", purpose=purpose)
    assert made.purpose == purpose
    assert (made.expires_at is not None) == (purpose == "batch")
    kept = client.files.create(file=b"bytes", purpose=purpose, expires_after=KEEP)  # type: ignore[arg-type]
    assert kept.expires_at == kept.created_at + 3600


@pytest.mark.parametrize("order", [[FILE, PURPOSE, ANCHOR, SECONDS], [SECONDS, PURPOSE, FILE, ANCHOR]])
def test_fields_come_before_or_behind_the_file(client: openai.OpenAI, files_stack: Stack, order: Any) -> None:
    reply = upload(files_stack, form(*order))
    assert reply.status == 200, reply.body
    made = reply.json()
    assert (made["purpose"], made["bytes"]) == ("user_data", 10)
    assert made["expires_at"] == made["created_at"] + 3600
    assert client.files.content(made["id"]).read() == b"some bytes"


def test_bytes_pass_as_they_are(client: openai.OpenAI) -> None:
    hard = bytes(range(256)) * 300 + f"\r\n--{BOUNDARY}x\r\n--\r\n".encode() * 50
    made = client.files.create(file=("x", hard), purpose="user_data")
    assert made.bytes == len(hard)
    assert client.files.content(made.id).read() == hard
    empty = client.files.create(file=("x", b""), purpose="user_data")
    assert (empty.bytes, client.files.content(empty.id).read()) == (0, b"")


def test_a_filename_is_told_and_never_a_path(client: openai.OpenAI, files_stack: Stack) -> None:
    for given, told in (
        ("../../etc/passwd", "passwd"),
        ("C:\\data\\a b.jsonl", "a b.jsonl"),
        ('say "hi".txt', 'say "hi".txt'),
        ("名前.jsonl", "名前.jsonl"),
        ("..", ".."),
    ):
        made = client.files.create(file=(given, b"1"), purpose="user_data")
        assert made.filename == told
        reply = get(files_stack.port, f"{PATH}/{made.id}/content")
        assert reply.headers["content-disposition"].startswith("attachment; filename*=UTF-8''")
        assert reply.headers["content-type"] == "application/octet-stream"
        assert reply.headers["x-content-type-options"] == "nosniff"
    assert all(
        re.fullmatch(r"(objects|records)/file-[0-9A-Z]{26}(\.json)?", name) for name in stored(files_stack.folder)
    )


def test_a_list_has_pages_an_order_and_purposes(client: openai.OpenAI, files_stack: Stack) -> None:
    made = [client.files.create(file=b"1", purpose=p).id for p in ("batch", "user_data", "batch", "batch", "vision")]  # type: ignore[arg-type]
    everything = get(files_stack.port, PATH).json()
    assert [file["id"] for file in everything["data"]] == made[::-1]
    assert (everything["object"], everything["has_more"]) == ("list", False)
    assert (everything["first_id"], everything["last_id"]) == (made[-1], made[0])
    page = client.files.list(limit=2, order="asc")
    assert [file.id for file in page.data] == made[:2]
    assert page.has_more
    assert [file.id for file in client.files.list(limit=2, order="asc")] == made
    assert [file.id for file in client.files.list(limit=1)] == made[::-1]
    assert [file.id for file in client.files.list(purpose="batch", limit=2, order="asc")] == [made[0], *made[2:4]]
    last = client.files.list(purpose="batch", limit=3)
    assert (len(last.data), last.has_more) == (3, False)
    client.files.delete(made[2])
    assert [file.id for file in client.files.list(after=made[2], order="asc")] == made[3:]
    none = get(files_stack.port, f"{PATH}?purpose=evals").json()
    assert none == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}


@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=0", "limit"), ("limit=10001", "limit"), ("limit=x", "limit"), ("order=up", "order"), ("after=x", "after")],
)
def test_a_list_that_cannot_be_is_refused(files_stack: Stack, query: str, param: str) -> None:
    reply = get(files_stack.port, f"{PATH}?{query}")
    assert reply.status == 400
    assert reply.error()["param"] == param


HUGE = ('name="purpose"', b"x" * 10_000)
BAD_FORMS: dict[str, tuple[bytes, str | None, str]] = {
    "no file": (form(PURPOSE), "file", "missing_required_parameter"),
    "no purpose": (form(FILE), "purpose", "missing_required_parameter"),
    "nothing": (form(), "file", "missing_required_parameter"),
    "an unknown purpose": (form(FILE, ('name="purpose"', b"batch_output")), "purpose", "invalid_value"),
    "two files": (form(FILE, FILE, PURPOSE), "file", "duplicate_parameter"),
    "two purposes": (form(PURPOSE, PURPOSE, FILE), "purpose", "duplicate_parameter"),
    "an unknown field": (form(FILE, PURPOSE, ('name="model"', b"x")), "model", "unknown_parameter"),
    "a huge value": (form(HUGE, FILE), "purpose", "invalid_value"),
    "a value that is no text": (form(('name="purpose"', b"\xff\xfe"), FILE), None, "invalid_multipart"),
    "an anchor alone": (form(FILE, PURPOSE, ANCHOR), "expires_after[seconds]", "missing_required_parameter"),
    "seconds alone": (form(FILE, PURPOSE, SECONDS), "expires_after[anchor]", "missing_required_parameter"),
    "another anchor": (
        form(FILE, PURPOSE, ('name="expires_after[anchor]"', b"last_use"), SECONDS),
        "expires_after[anchor]",
        "invalid_value",
    ),
    **{
        f"{seconds!r} seconds": (
            form(FILE, PURPOSE, ANCHOR, ('name="expires_after[seconds]"', seconds)),
            "expires_after[seconds]",
            "invalid_value",
        )
        for seconds in (b"3599", b"2592001", b"-1", b"4e3", b"", "٣٦٠٠".encode(), b"9" * 500)
    },
    "a name that is no text": (
        form(b'Content-Disposition: form-data; name="file"; filename="\xff\xfe"\r\n\r\nx', PURPOSE),
        None,
        "invalid_multipart",
    ),
    "a name with a control character": (
        form(('name="file"; filename="a\x07b"', b"x"), PURPOSE),
        "file",
        "invalid_value",
    ),
    "a long name": (form((f'name="file"; filename="{"x" * 600}"', b"x"), PURPOSE), "file", "invalid_value"),
    "a part without a name": (form(b"Content-Disposition: form-data\r\n\r\nx"), None, "invalid_multipart"),
    "a part without a head": (form(b"\r\nx"), None, "invalid_multipart"),
    "an endless header": (form(b"X-A: " + b"a" * 10_000 + b"\r\n\r\nx"), None, "invalid_multipart"),
    "many headers": (form(b"X-A: a\r\n" * 1000 + b"\r\nx"), None, "invalid_multipart"),
    "no end": (form(FILE, PURPOSE, end=False), None, "invalid_multipart"),
    "junk": (b"\x00\xff" * 5000, None, "invalid_multipart"),
    "another boundary": (b"--other\r\n\r\n--other--", None, "invalid_multipart"),
}


@pytest.mark.parametrize(("body", "param", "code"), BAD_FORMS.values(), ids=BAD_FORMS)
def test_a_form_that_cannot_be_is_refused_and_leaves_nothing(
    files_stack: Stack, body: bytes, param: str | None, code: str
) -> None:
    reply = upload(files_stack, body)
    assert reply.status == 400, reply.body
    error = reply.error()
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["code"] == code
    assert stored(files_stack.folder) == []


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("multipart/form-data", 400),
        ("multipart/form-data; boundary=", 400),
        (f"multipart/form-data; boundary={'x' * 5000}", 400),
        ("multipart/form-data; boundary=other", 400),
        ("application/json", 415),
        ("application/x-www-form-urlencoded", 415),
        (None, 415),
    ],
)
def test_a_body_that_is_no_form_is_refused(files_stack: Stack, content_type: str | None, status: int) -> None:
    reply = upload(files_stack, form(FILE, PURPOSE), content_type)
    assert reply.status == status
    assert reply.error()["type"] == "invalid_request_error"
    assert get(files_stack.port, "/healthz").status == 200


def test_only_uploads_are_forms(files_stack: Stack) -> None:
    reply = post(files_stack.port, form(FILE), path="/v1/embeddings", headers={"content-type": FORM})
    assert reply.status == 415
    assert post(files_stack.port, b"", path=PATH, headers={"content-length": None, "content-type": None}).status == 400


@pytest.mark.parametrize(
    "file_id", ["file-x", "file-" + "0" * 26, "..%2f..%2fapi_key", "storage-id", "file-%00", "%ff"]
)
def test_an_id_that_names_no_file_is_not_found(files_stack: Stack, file_id: str) -> None:
    for path in (f"{PATH}/{file_id}", f"{PATH}/{file_id}/content"):
        reply = get(files_stack.port, path)
        assert (reply.status, reply.error()["type"]) == (404, "invalid_request_error"), path


def test_a_file_may_be_just_so_large(client: openai.OpenAI, files_stack: Stack) -> None:
    assert client.files.create(file=bytes(MIB), purpose="user_data").bytes == MIB
    with pytest.raises(openai.APIStatusError) as raised:
        client.files.create(file=bytes(MIB + 1), purpose="user_data")
    assert (raised.value.status_code, raised.value.code) == (413, "request_too_large")
    assert "FASTCHAT_Q_MAX_FILE_BYTES" in raised.value.message
    assert len(list(client.files.list())) == 1


def test_a_file_of_unknown_size_is_cut_off_while_it_comes(files_stack: Stack) -> None:
    connection = Connection(files_stack.port)
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {API_KEY}\r\ncontent-type: {FORM}\r\n"
    connection.socket.sendall(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
    first = form(PURPOSE, end=False) + f"--{BOUNDARY}\r\n".encode() + head_of(FILE[0])
    for piece in (first, *[bytes(MIB)] * 4):
        connection.socket.sendall(b"%x\r\n" % len(piece) + piece + b"\r\n")
    connection.socket.sendall(b"0\r\n\r\n")
    reply = connection.reply()
    assert (reply.status, reply.error()["code"]) == (413, "request_too_large")
    assert stored(files_stack.folder) == []


def test_a_client_that_hangs_up_leaves_nothing(files_stack: Stack) -> None:
    connection = begin(files_stack.port, size=MIB)
    wait_until(lambda: is_writing(files_stack.folder), "bytes arrive")
    connection.close()
    wait_until(lambda: stored(files_stack.folder) == [], "they are gone")
    assert "unexpected error" not in files_stack.api.output()


def test_a_client_that_sends_nothing_more_is_told_so(files_stack: Stack) -> None:
    reply = begin(files_stack.port, size=MIB).reply()
    assert (reply.status, reply.error()["code"]) == (408, "upload_stalled")
    assert stored(files_stack.folder) == []


def test_a_tenant_stores_only_so_much(client: openai.OpenAI, files_stack: Stack) -> None:
    made = [client.files.create(file=bytes(MIB), purpose="user_data") for _ in range(8)]
    with pytest.raises(openai.PermissionDeniedError) as raised:
        client.files.create(file=b"1", purpose="user_data")
    assert (raised.value.code, raised.value.type) == ("storage_quota_exceeded", "insufficient_quota")
    assert str(8 * MIB) in raised.value.message
    assert len(stored(files_stack.folder)) == 16
    client.files.delete(made[0].id)
    assert client.files.create(file=b"1", purpose="user_data").bytes == 1


def test_uploads_at_the_same_time_share_the_quota(client: openai.OpenAI, files_stack: Stack) -> None:
    outcomes: list[int] = []

    def one() -> None:
        with files_stack.client() as own:
            try:
                outcomes.append(own.files.create(file=bytes(MIB), purpose="user_data").bytes)
            except openai.PermissionDeniedError:
                outcomes.append(0)

    threads = [threading.Thread(target=one) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [0] * 4 + [MIB] * 8
    assert len(stored(files_stack.folder)) == 16


def test_tenants_do_not_see_each_others_files(client: openai.OpenAI, files_stack: Stack) -> None:
    base = str(client.base_url)
    mine, theirs = (
        openai.OpenAI(base_url=base, api_key=files_stack.make_key("--tenant", tenant), max_retries=0)
        for tenant in ("mine", "theirs")
    )
    with mine, theirs:
        made = mine.files.create(file=b"secret", purpose="user_data")
        unknown = new_file_id()
        for call in (theirs.files.retrieve, theirs.files.content, theirs.files.delete):
            messages = []
            for file_id in (made.id, unknown):
                with pytest.raises(openai.NotFoundError) as raised:
                    call(file_id)
                messages.append(raised.value.message.replace(file_id, "ID"))
            assert messages[0] == messages[1]
        assert list(theirs.files.list()) == []
        assert [file.id for file in mine.files.list()] == [made.id]
        assert client.files.content(made.id).read() == b"secret"  # an admin's key


def test_two_api_servers_share_the_files(client: openai.OpenAI, files_stack: Stack) -> None:
    port = free_port()
    other = start_api(files_stack, port)
    try:
        with files_stack.client(port) as second:
            made = client.files.create(file=b"shared", purpose="user_data")
            assert second.files.content(made.id).read() == b"shared"
            second.files.delete(made.id)
        assert list(client.files.list()) == []
    finally:
        other.stop()


def test_a_server_with_a_storage_of_its_own_takes_no_files(client: openai.OpenAI, files_stack: Stack) -> None:
    client.files.create(file=b"1", purpose="user_data")
    port = free_port()
    other = start_api(files_stack, port, FASTCHAT_Q_STORAGE_URL=f"file://{files_stack.folder}/elsewhere")
    try:
        with files_stack.client(port) as second, pytest.raises(openai.InternalServerError) as raised:
            second.files.create(file=b"2", purpose="user_data")
        assert (raised.value.status_code, raised.value.code) == (503, "storage_unavailable")
        assert keys.FILE_STORAGE in other.output()
    finally:
        other.stop()


def test_a_server_killed_within_an_upload_leaves_no_half_file(stack: Stack) -> None:
    with stack.client() as client:
        whole = client.files.create(file=b"whole", purpose="user_data")
        connection = begin(stack.port)
        with contextlib.suppress(OSError):
            for _ in range(30):
                connection.socket.sendall(bytes(MIB))
        wait_until(lambda: is_writing(stack.folder), "bytes arrive")
        stack.api.kill()
        stack.api = stack.start_api(stack.port)
        assert [file.id for file in client.files.list()] == [whole.id]
        names = [name for name in stored(stack.folder) if not name.startswith("partial/")]
        assert names == [object_key(whole.id), f"records/{whole.id}.json"]
        [partial] = (stack.folder / "files" / "partial").iterdir()
        old = time.time() - 2 * DAY_S
        os.utime(partial, (old, old))
        stack.start("orchestrator", "orchestrator")
        wait_until(lambda: not partial.exists(), "housekeeping finds it")
        assert client.files.content(whole.id).read() == b"whole"


def test_a_disk_that_is_full_is_said_so_and_serves_again_when_there_is_room(stack: Stack) -> None:
    disk = stack.folder / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=4m tmpfs {disk} && exec "$@"'
    prefix = ("unshare", "-rm", "sh", "-c", mount, "sh")
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small disk cannot be mounted here")
    stack.api.stop()
    stack.api = stack.start_api(stack.port, prefix=prefix, FASTCHAT_Q_STORAGE_URL=f"file://{disk}/files")
    with stack.client() as client:
        kept = client.files.create(file=bytes(MIB), purpose="user_data")
        with pytest.raises(openai.InternalServerError) as raised:
            client.files.create(file=bytes(40 * MIB), purpose="user_data")
        assert (raised.value.status_code, raised.value.code) == (507, "storage_full")
        assert raised.value.response.headers["x-should-retry"] == "false"
        assert [file.id for file in client.files.list()] == [kept.id]

        def fits() -> bool:  # a thread of the storage may hold what was refused a moment longer
            try:
                return client.files.create(file=bytes(2 * MIB), purpose="user_data").bytes == 2 * MIB
            except openai.InternalServerError:
                return False

        wait_until(fits, "there is room again")
        assert "unexpected error" not in stack.api.output()


def test_what_redis_lost_comes_back_from_the_storage(stack: Stack) -> None:
    with stack.client() as client:
        made = [client.files.create(file=b"1" * n, purpose="user_data") for n in (10, 20, 30)]
        stack.redis.flushall()
        assert client.files.retrieve(made[1].id) == made[1]  # at once
        assert client.files.content(made[1].id).read() == b"1" * 20
        orchestrator = stack.start("orchestrator", "orchestrator")
        wait_until(lambda: len(client.files.list().data) == 3, "the index is back")
        assert list(client.files.list(order="asc")) == made
        assert stack.redis.hgetall(keys.FILE_BYTES) == {"admin": "60"}
        assert orchestrator.stop() == 0
        stack.redis.flushall()
        stack.start("orchestrator-again", "orchestrator")
        wait_until(lambda: len(client.files.list().data) == 3, "and again, at its start")


def test_a_large_file_takes_no_memory(stack: Stack) -> None:
    size = 200 * MIB
    large = stack.folder / "large"
    with large.open("wb") as output:
        output.truncate(size)
    process = psutil.Process(stack.api.pid)
    with stack.client() as client:
        client.files.create(file=b"warm", purpose="user_data")
        before, peak = process.memory_info().rss, Peak(process)
        with peak:
            made = client.files.create(file=large, purpose="user_data")
            assert made.bytes == size
            with client.files.with_streaming_response.content(made.id) as response:
                assert sum(len(piece) for piece in response.iter_bytes(MIB)) == size
        assert peak.rss - before < 40 * MIB
        client.files.delete(made.id)


class Peak:
    """The most memory that a process holds meanwhile."""

    def __init__(self, process: psutil.Process) -> None:
        self.rss = 0
        self._process, self._done = process, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.rss = max(self.rss, self._process.memory_info().rss)


class Clock:
    """A time that a test moves."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def files(redis: "Redis", folder: Path, clock: Clock) -> Files:
    return Files(redis, Storage(f"file://{folder}/files"), clock)


async def names(files: Files, tenant: str | None = "t") -> list[str]:
    records, _ = await files.list(tenant, order="asc")
    return [record.filename for record in records]


async def test_a_file_that_has_expired_is_gone_at_once_and_its_bytes_with_the_next_tick(
    files: Files, redis: "Redis", clock: Clock, folder: Path
) -> None:
    short = await files.create(b"12", tenant="t", filename="short", purpose="batch", expires_after_s=3600)
    await files.create(b"345", tenant="t", filename="long", purpose="batch", expires_after_s=7200)
    await files.create(b"6789", tenant="u", filename="stays", purpose="batch")
    clock.now += 3600
    assert await names(files) == ["long"]
    with pytest.raises(UnknownFileError):
        await files.get(short.id, "t")
    assert len(stored(folder)) == 6
    assert (await upkeep.tick(files, redis, clock)).expired == 1
    assert len(stored(folder)) == 4
    assert await redis.hgetall(keys.FILE_BYTES) == {b"t": b"3", b"u": b"4"}
    clock.now += 10 * 365 * DAY_S
    assert (await upkeep.tick(files, redis, clock)).expired == 1
    assert await names(files, None) == ["stays"]
    assert await redis.hgetall(keys.FILE_BYTES) == {b"u": b"4"}


async def test_a_tick_before_the_first_file_makes_nothing(files: Files, redis: "Redis", folder: Path) -> None:
    assert await upkeep.tick(files, redis) == upkeep.Upkeep()
    assert stored(folder) == []
    assert await redis.keys("*") == []


async def test_bytes_that_no_record_speaks_of_go_after_a_day(
    files: Files, redis: "Redis", clock: Clock, folder: Path
) -> None:
    kept = await files.create(b"1", tenant="t", filename="kept", purpose="batch")
    draft = await files.write(b"an upload whose process died")
    await files.storage.put("batches/x/part", b"somebody else's")
    assert (await upkeep.tick(files, redis, clock)).leftovers == 0
    clock.now += DAY_S + 1
    assert (await upkeep.tick(files, redis, clock)).leftovers == 0  # it looks once an hour
    await redis.delete(keys.FILES_COMPARED)
    assert (await upkeep.tick(files, redis, clock)).leftovers == 1
    assert await files.storage.size(object_key(draft.id)) is None
    assert await files.storage.get("batches/x/part") == b"somebody else's"
    assert await names(files) == [kept.filename]


@pytest.mark.parametrize("died_after", ["record", "index"])
async def test_a_deletion_whose_process_died_is_ended(
    files: Files, redis: "Redis", clock: Clock, folder: Path, died_after: str
) -> None:
    record = await files.create(b"1", tenant="t", filename="x", purpose="batch")
    await upkeep.tick(files, redis, clock)
    await files.storage.delete([f"records/{record.id}.json"])
    if died_after == "index":
        await files.forget(record)
    clock.now += DAY_S + 1
    await redis.delete(keys.FILES_COMPARED)
    done = await upkeep.tick(files, redis, clock)
    assert done == upkeep.Upkeep(forgotten=int(died_after == "record"), leftovers=1)
    assert await names(files) == []
    assert stored(folder) == []
    assert await redis.hgetall(keys.FILE_BYTES) == {}


async def test_a_record_that_cannot_be_read_harms_no_other(
    files: Files, redis: "Redis", clock: Clock, folder: Path
) -> None:
    bad = await files.create(b"1", tenant="t", filename="bad", purpose="batch")
    await files.create(b"1", tenant="t", filename="good", purpose="batch")
    for junk in (b"", b"{}", b"[]", b"\xff", b'{"id": 1', json.dumps({"id": bad.id}).encode()):
        (folder / "files" / "records" / f"{bad.id}.json").write_bytes(junk)
        await redis.flushall()
        await upkeep.tick(files, redis, clock)
        assert await names(files) == ["good"]
        with pytest.raises(UnknownFileError):
            await files.get(bad.id, None)


async def test_processes_with_two_storages_do_not_touch_each_others_files(
    files: Files, redis: "Redis", clock: Clock, folder: Path
) -> None:
    await files.create(b"1", tenant="t", filename="x", purpose="batch")
    elsewhere = Files(redis, Storage(f"file://{folder}/elsewhere"), clock)
    assert await upkeep.tick(elsewhere, redis, clock) == upkeep.Upkeep()
    assert await names(files) == ["x"]
    with pytest.raises(StorageUnavailableError):
        await elsewhere.create(b"1", tenant="t", filename="y", purpose="batch")
    await redis.delete(keys.FILE_STORAGE)  # what the log says to do when the change was wanted
    await elsewhere.create(b"1", tenant="t", filename="y", purpose="batch")
    await upkeep.tick(elsewhere, redis, clock)
    assert await names(elsewhere) == ["y"]


async def test_with_a_full_redis_no_file_comes_and_files_can_go(
    files: Files, redis: "Redis", clock: Clock, folder: Path
) -> None:
    first = await files.create(b"1", tenant="t", filename="first", purpose="batch")
    clock.now += 1
    await files.create(b"2", tenant="t", filename="second", purpose="batch", expires_after_s=3600)
    await upkeep.tick(files, redis, clock)
    await redis.config_set("maxmemory", "1")
    try:
        with pytest.raises(OutOfMemoryError):
            await files.create(b"3", tenant="t", filename="third", purpose="batch")
        assert await names(files) == ["first", "second"]
        await files.delete(first.id, "t")
        clock.now += 3600
        assert (await upkeep.tick(files, redis, clock)).expired == 1
    finally:
        await redis.config_set("maxmemory", "0")
    assert stored(folder) == []
    assert await redis.hgetall(keys.FILE_BYTES) == {}


async def test_the_same_id_again_replaces_a_file_and_counts_once(files: Files, redis: "Redis") -> None:
    file_id = new_file_id()
    for data in (b"first", b"the second"):
        await files.create(data, tenant="t", filename="x", purpose="batch_output", file_id=file_id)
    record = await files.get(file_id, "t")
    assert (record.bytes, await files.stored_bytes("t")) == (10, 10)
    assert b"".join([piece async for piece in files.content(record)]) == b"the second"
    assert len(await names(files)) == 1


async def test_who_fails_to_repeat_a_file_leaves_what_another_process_made(
    files: Files, redis: "Redis", clock: Clock
) -> None:
    file_id = new_file_id(clock())
    await files.create(b"first", tenant="t", filename="x", purpose="batch_output", file_id=file_id)
    await redis.config_set("maxmemory", "1")
    try:
        with pytest.raises(OutOfMemoryError):
            await files.create(b"again", tenant="t", filename="x", purpose="batch_output", file_id=file_id)
    finally:
        await redis.config_set("maxmemory", "0")
    for _ in range(2):
        record = await files.get(file_id, "t")
        assert b"".join([piece async for piece in files.content(record)]) == b"again"
        await redis.flushall()


async def test_what_takes_many_pages_is_listed_and_found_again(
    files: Files, redis: "Redis", clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastchat_q.files.PAGE", 3)
    for number in range(10):
        clock.now += 1
        await files.create(b"1", tenant="t", filename=str(number), purpose=("evals", "batch")[number % 2])
    for _ in range(2):
        assert await names(files) == [str(number) for number in range(10)]
        found, more = await files.list("t", purpose="evals", limit=4)
        assert ([record.filename for record in found], more) == (["8", "6", "4", "2"], True)
        found, more = await files.list("t", purpose="evals", after=found[-1].id)
        assert ([record.filename for record in found], more) == (["0"], False)
        await redis.flushall()
        assert (await upkeep.tick(files, redis, clock)).indexed == 10
