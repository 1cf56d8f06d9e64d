"""Fetching images for a server that allows it: from the Internet, within limits, and nothing from our own network."""

import asyncio
import base64
import hashlib
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import trustme
from fastchat_q.api.media import Images
from fastchat_q.api.remote_images import Fetcher, is_public
from fastchat_q.api.schemas import ChatRequest

from fastchat_q.errors import InvalidRequestError

from .http_client import Reply, post
from .servers import free_port
from .stack import API_KEY, Stack

PNG = b"\x89PNG\r\n\x1a\n" + bytes(1000)
ANSWERS = {"/a.png": PNG, "/b.png": PNG + b"b", "/page": b"<html>" * 100, "/large": PNG + bytes(200_000)}


class Site(BaseHTTPRequestHandler):
    """A few files, a redirect, and one that does not answer in time."""

    def do_GET(self) -> None:
        if self.path == "/slow":
            released.wait(20)
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/a.png")
            self.end_headers()
            return
        content = ANSWERS.get(self.path)
        self.send_response(200 if content else 404)
        self.end_headers()  # without a length: the limit is kept while reading
        self.wfile.write(content or b"")

    def log_message(self, *args: object) -> None:
        pass


released = threading.Event()


@pytest.fixture(scope="module")
def site() -> Iterator[tuple[str, ssl.SSLContext]]:
    """Its base URL, and what trusts it."""
    ca = trustme.CA()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    theirs, ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    ca.issue_cert("localhost").configure_cert(theirs)
    ca.configure_trust(ours)
    server.socket = theirs.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"https://localhost:{server.server_port}", ours
    released.set()
    server.shutdown()
    server.server_close()


def fetched(fetcher: Fetcher, *urls: str) -> dict[str, bytes]:
    return asyncio.run(fetcher.fetch_all([(url, f"p{number}") for number, url in enumerate(urls)]))


def test_images_are_fetched_by_url(site: tuple[str, ssl.SSLContext]) -> None:
    base, tls = site
    fetcher = Fetcher(100_000, may_reach=lambda _: True, tls=tls)
    assert fetched(fetcher, f"{base}/a.png", f"{base}/b.png") == {f"{base}/a.png": PNG, f"{base}/b.png": PNG + b"b"}


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/page", "it is not PNG"),
        ("/large", "more than 100000 bytes"),
        ("/moved", "redirects"),
        ("/none", "status 404"),
        ("/slow", "within 1 s"),
    ],
)
def test_what_is_no_image_in_time_and_size_is_refused(site: tuple[str, ssl.SSLContext], path: str, why: str) -> None:
    base, tls = site
    with pytest.raises(InvalidRequestError, match=why) as refused:
        fetched(Fetcher(100_000, timeout_s=1, may_reach=lambda _: True, tls=tls), f"{base}/a.png", base + path)
    assert (refused.value.code, refused.value.param) == ("image_not_fetched", "p1")


def test_a_server_that_nobody_vouches_for_is_refused(site: tuple[str, ssl.SSLContext]) -> None:
    with pytest.raises(InvalidRequestError, match="SSLCertVerificationError"):
        fetched(Fetcher(100_000, may_reach=lambda _: True), f"{site[0]}/a.png")


@pytest.mark.parametrize(
    "url", ["{base}/a.png", "https://127.0.0.1/", "https://[::1]/", "https://0x7f.1/", "https://169.254.169.254/latest"]
)
def test_nothing_of_our_own_network_is_reached(site: tuple[str, ssl.SSLContext], url: str) -> None:
    with pytest.raises(InvalidRequestError, match="not on the public Internet"):
        fetched(Fetcher(100_000, tls=site[1]), url.format(base=site[0]))


async def test_names_that_are_not_resolved_hold_up_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    def stuck(*_: object, **__: object) -> list[object]:
        answered.wait(20)
        return []

    monkeypatch.setattr("fastchat_q.api.remote_images.socket.getaddrinfo", stuck)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
    try:
        with pytest.raises(InvalidRequestError, match=r"did not come within 0\.2 s"):
            await Fetcher(1000, timeout_s=0.2).fetch_all([(f"https://{n}.example.org/", "p") for n in range(4)])
        async with asyncio.timeout(10):
            assert await asyncio.to_thread(lambda: "at once") == "at once"
    finally:
        answered.set()


def test_a_job_names_a_fetched_image_by_its_digest(site: tuple[str, ssl.SSLContext]) -> None:
    base, tls = site
    data = f"data:image/png;base64,{base64.b64encode(PNG + b'c').decode()}"
    urls = (f"{base}/a.png", data, f"{base}/b.png", f"{base}/a.png")
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    body = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": parts}]})
    images = Images(remote=True)
    job = asyncio.run(images.fetch(body.to_job(images), Fetcher(100_000, may_reach=lambda _: True, tls=tls)))
    expected = [hashlib.sha256(content).hexdigest() for content in (PNG, PNG + b"c", PNG + b"b", PNG)]
    assert list(job.messages[0].images) == expected
    assert {digest: hashlib.sha256(content).hexdigest() for digest, content in images.blobs.items()} == {
        digest: digest for digest in expected
    }


def test_nothing_is_fetched_for_a_request_that_is_refused_anyway(stack: Stack) -> None:
    """This server's own address is never fetched from: that error would tell of a try."""
    stack.start_worker("--model", "echo", "--engine", "echo")
    stack.start_scripted_worker("script")
    port = free_port()
    stack.start_api(port, FASTCHAT_Q_ALLOW_REMOTE_IMAGES="true")
    limited = stack.make_key("--rpm", "1")

    def ask(model: str, key: str = API_KEY) -> Reply:
        part = {"type": "image_url", "image_url": {"url": f"https://127.0.0.1:{port}/a.png"}}
        body = {"model": model, "messages": [{"role": "user", "content": [part]}], "max_tokens": 5}
        return post(port, body, headers={"authorization": f"Bearer {key}"})

    assert ask("nobody").error()["code"] == "model_not_found"
    assert ask("echo").error()["code"] == "unsupported_parameter"
    assert ask("script", limited).error()["code"] == "image_not_fetched"
    assert ask("script", limited).error()["code"] == "rate_limit_exceeded"


@pytest.mark.parametrize("url", ["http://example.org/a.png", "https://me:pw@example.org/", "https://", "https://a b/"])
def test_odd_urls_are_refused(url: str) -> None:
    with pytest.raises(InvalidRequestError):
        fetched(Fetcher(100_000), url)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
     "::1", "fe80::1%eth0", "fc00::1", "::ffff:10.0.0.1", "2002:a00:1::", "64:ff9b::a00:1"],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)
    assert is_public("1.1.1.1")
    assert is_public("2606:4700:4700::1111")


@pytest.mark.parametrize(
    "url",
    ["http://169.254.169.254/latest/meta-data", "HTTPS://example.org/a.png", "https://127.0.0.1/", "http://[::1]:6379/",
     "file:///etc/passwd", "gopher://127.0.0.1:6379/_FLUSHALL", "//example.org/a.png", "ftp://example.org/a.png",
     "\thttps://example.org/a.png", "javascript:alert(1)", "data:,https://example.org/", ""],
)  # fmt: skip
def test_without_the_setting_nothing_is_fetched_whatever_it_is_called(url: str) -> None:
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    body = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": parts}]})
    images = Images()
    with pytest.raises(InvalidRequestError) as refused:
        body.to_job(images)
    assert refused.value.code in ("remote_url", "invalid_image_url")
    assert refused.value.param == "messages[0].content[0].image_url.url"
    assert not images.named
