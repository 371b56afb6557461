"""The gate of section 11: who may open a connection, decided before the upgrade, over raw TCP."""

import base64
import hashlib
import json
import logging
import re
import socket
import struct
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import pytest
from wire import UPGRADE

import memws

Serve = Callable[..., memws.WebSocketServer]
TOKEN = "Secret-token_1~"
BEARER = f"Authorization: Bearer {TOKEN}"
LOCAL, EVIL, FOREIGNER = "Host: localhost", "Host: evil.example", "Origin: http://evil.example"


def words(text: str) -> list[str]:
    return text.split()


class Answer(NamedTuple):
    status: int
    head: str
    body: bytes


class Tcp:
    def __init__(self, server: memws.WebSocketServer) -> None:
        host = server.host if server.host.startswith("127.") else "127.0.0.1"
        self.socket = socket.create_connection((host, server.port), timeout=10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.socket.close()

    def ask(self, *headers: str, path: str = "/", method: str = "GET", upgrade: bool = True) -> Answer:
        """Send a request with these headers and read the answer; the body only where there is no upgrade."""
        lines = [f"{method} {path} HTTP/1.1", *headers, *(UPGRADE if upgrade else ()), "", ""]
        self.socket.sendall("\r\n".join(lines).encode("latin-1"))
        head = b""
        while b"\r\n\r\n" not in head:
            piece = self.socket.recv(1)
            assert piece, f"closed after {head!r}"
            head += piece
        status = int(head.split()[1])
        return Answer(status, head.decode("latin-1"), b"" if status == 101 else self.rest())

    def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        return b"".join(iter(lambda: self.socket.recv(65_536), b""))


def ask(server: memws.WebSocketServer, *headers: str, **request: Any) -> Answer:
    """The answer to one request on a connection of its own; it may be one that opens a WebSocket."""
    with Tcp(server) as tcp:
        return tcp.ask(*headers, **request)


def all_get(server: memws.WebSocketServer, status: int, header: str, values: list[str], *headers: str) -> None:
    """Fail unless each value of a header gets this status."""
    found = {value: ask(server, f"{header}: {value}", *headers).status for value in values}
    assert found == dict.fromkeys(values, status)


GOOD_HOSTS = ["127.0.0.1", "localhost", "LocalHost:1", "127.0.0.1:65535", "[::1]", "[::1]:8282"]
ADDRESSES = ["0.0.0.0", "192.168.0.1", "[fe80::1]:8282", "[::]", "[2001:db8::1]", "[::ffff:127.0.0.1]", "10.0.0.7:1"]  # noqa: S104
BAD_HOSTS = words(
    r"""evil.example localhost.evil.example evil.example:8282 localhost. localhost.:8282 127.0.0.1. 127.0.0.1:
127.0.0.1.nip.io 127.0.0.1:99999 127.0.0.1:65536 127.0.0.1:-1 127.0.0.1:8282:8282 127.0.0.1:port 127.0.0.1:²
user@localhost user:password@127.0.0.1 localhost@evil.example localhost/ localhost# localhost? localhost\
http://localhost localhost,evil.example ::1 ::1:8282 [::1 ::1] [] [::1]x [::1]: [::1]] [[::1]] [::1%lo] [::1%25lo]
[localhost] 0 127.1 2130706433 0x7f000001 0177.0.0.1 300.0.0.1 1.2.3 [2001:db8::g] null * loçalhost"""
)
BAD_HOSTS += ["", "localhost evil.example", "localhost, evil.example", "x" * 5_000]
GOOD_ORIGINS = [f"http://{host}" for host in ("localhost:8888", "[::1]:9", "localhost:65535")]
GOOD_ORIGINS += ["https://127.0.0.1", "HTTP://LOCALHOST"]
BAD_ORIGINS = words(
    r"""null NULL * localhost //localhost http: http:// http:/// http:/localhost http:localhost
http://evil.example https://localhost.evil.example http://127.0.0.1.nip.io http://localhost@evil.example
http://evil.example@localhost http://user:password@localhost http://localhost. http://localhost/
http://localhost:8888/ http://localhost/page http://localhost? http://localhost# http://localhost\@evil.example
http://localhost: http://localhost:99999 http://localhost:-1 http://localhost:http http://[::1 http://::1
http://[::1%lo] http://127.1 http://localhost,http://localhost file:// file://localhost ws://localhost ftp://localhost
chrome-extension://abcdefghijklmnop javascript:alert(1) data:text/html,x http://loçalhost"""
)
BAD_ORIGINS += ["", "http://localhost http://localhost", "http://" + "x" * 5_000]
FOREIGN = [f"http://{host}" for host in ("192.168.0.1", "0.0.0.0", "[0:0:0:0:0:0:0:1]")]  # noqa: S104


def test_hosts(serve: Serve) -> None:
    """Loopback names pass as Host with any port; any other Host gets 403 before the upgrade, malformed ones too; none,
    or several, get 400, for the page and a health check too."""
    server = serve()
    all_get(server, 101, "Host", GOOD_HOSTS)
    all_get(server, 403, "Host", [*BAD_HOSTS, *ADDRESSES])
    for hosts in ([], [LOCAL, LOCAL], [LOCAL, EVIL]):
        for path, upgrade in (("/", True), ("/", False), ("/healthz", True)):
            assert ask(server, *hosts, path=path, upgrade=upgrade).status == 400


def test_origins(serve: Serve) -> None:
    """Pages of loopback names, and scripts without an Origin, may connect; pages of any other Origin get 403."""
    server = serve()
    assert ask(server, "Host: localhost").status == 101
    all_get(server, 101, "Origin", GOOD_ORIGINS, "Host: localhost")
    all_get(server, 403, "Origin", [*BAD_ORIGINS, *FOREIGN], "Host: localhost")
    for second in ("http://localhost", "http://evil.example"):
        assert ask(server, "Host: localhost", "Origin: http://localhost", f"Origin: {second}").status == 403


def test_with_a_token_addresses_are_right(serve: Serve) -> None:
    """Where a token is set IP literals pass as Host and Origin, for no page knows the token; foreign names never do."""
    server = serve(host="0.0.0.0", token=TOKEN)  # noqa: S104
    all_get(server, 101, "Host", ADDRESSES, BEARER)
    all_get(server, 401, "Host", ADDRESSES)
    all_get(server, 403, "Host", BAD_HOSTS, BEARER)
    all_get(server, 101, "Origin", FOREIGN[:1], "Host: localhost", BEARER)
    all_get(server, 401, "Origin", FOREIGN[:1], "Host: localhost")
    all_get(server, 403, "Origin", BAD_ORIGINS, "Host: localhost", BEARER)


def test_what_is_allowed_passes(serve: Serve) -> None:
    """Allowed names, hosts and origins, and the own address pass, in any case and port; nothing like them does."""
    origins = ["https://Lab.example:8443/", "chrome-extension://abcdef"]
    allowed = ["mine.example", "Other.Example:80", "2001:db8::1", "[2001:db8::2]"]
    server = serve(host="127.0.0.2", allow_host=allowed, allow_origin=origins)
    hosts = ["mine.example", "MINE.example:7", "other.example", "other.example:81", "lab.example", "localhost"]
    all_get(server, 101, "Host", [*hosts, "127.0.0.2:8282", "[2001:db8::1]:8282", "[2001:db8::2]"])
    hosts = ["sub.mine.example", "mine.example.", "example", "https://lab.example", "127.0.0.3:8282", "[2001:db8::3]"]
    all_get(server, 403, "Host", hosts)
    pages = [f"https://{host}" for host in ("lab.example:8443", "LAB.example:8443", "lab.example")] + [origins[1]]
    all_get(server, 101, "Origin", pages, LOCAL)
    pages = ["https://sub.lab.example", "https://lab.example.evil.example", "chrome-extension://abcdefg", "null"]
    all_get(server, 403, "Origin", pages, LOCAL)


PROTOCOL = "Sec-WebSocket-Protocol"
RIGHT_TOKENS = [
    ([BEARER], "/"), ([f"Authorization: bearer {TOKEN}"], "/"), ([f"{PROTOCOL}: memws, {TOKEN}"], "/"),
    ([f"{PROTOCOL}: memws,{TOKEN}"], "/"), ([f"{PROTOCOL}: memws", f"{PROTOCOL}: {TOKEN}"], "/"),
    ([], f"/?token={TOKEN}"), ([], f"/chat?x=1&token={TOKEN}"), ([], "/?token=Secret%2Dtoken_1~"),
    (["Authorization: Bearer wrong"], f"/?token={TOKEN}"),
]  # fmt: skip
WRONG_TOKENS = [([f"Authorization: {value}"], "/") for value in (
    "Bearer", "Bearer ", "Bearer wrong", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", f"Bearer {TOKEN.upper()}", TOKEN,
    f"Basic {TOKEN}", f"Bearer {TOKEN}, {TOKEN}", "Bearer \xe9\xff", "Bearer " + "x" * 7_000,
)]  # fmt: skip
WRONG_TOKENS += [([f"{PROTOCOL}: {value}"], "/") for value in ("memws", TOKEN, f"chat, {TOKEN}", "memws, wrong")]
WRONG_TOKENS += [([], f"/{path}") for path in (
    "", "?token=", "?token", "?token=wrong", f"?Token={TOKEN}", f"?xtoken={TOKEN}", TOKEN, f"token={TOKEN}",
    "?token=%ff%00", "?token=%",
)]  # fmt: skip
WRONG_TOKENS += [([f"Cookie: token={TOKEN}"], "/")]


def test_tokens(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """The very token passes in three ways, anything else gets 401; it is told to nobody, nor logged, nor in a repr."""
    caplog.set_level(logging.DEBUG)
    server = serve(token=TOKEN)
    for expected, tokens in ((101, RIGHT_TOKENS), (401, WRONG_TOKENS)):
        for headers, path in tokens:
            answer = ask(server, "Host: localhost", *headers, path=path)
            assert (headers, path, answer.status) == (headers, path, expected)
            assert TOKEN not in answer.head + answer.body.decode()
            chosen = expected == 101 and f"{PROTOCOL}: memws" in str(headers)
            assert (f"{PROTOCOL}: memws\r\n" in answer.head) is chosen
    assert TOKEN not in repr(server)
    server.stop()
    assert TOKEN not in caplog.text


def test_plain_http(serve: Serve) -> None:
    """The page and /healthz are behind the Host check, without a token, whatever the Origin, also where all connections
    are taken; another method than GET gets 405; /healthz tells status, version and whether a token is needed."""
    server, about = serve(token=TOKEN, max_connections=1), {"status": "ok", "version": memws.__version__}
    with Tcp(server) as first:
        assert first.ask(LOCAL, BEARER).status == 101
        for path in ("/", "/?token=x", "/healthz", "/healthz?verbose=1"):
            for method in words("GET HEAD POST PUT DELETE OPTIONS PATCH"):
                for headers, status in (((EVIL,), 403), ((LOCAL, FOREIGNER), 200 if method == "GET" else 405)):
                    assert ask(server, *headers, path=path, method=method, upgrade=False).status == status
        for each, more in ((server, {"token": True}), (serve(db=":memory:"), {})):
            answer = ask(each, LOCAL, path="/healthz", upgrade=False)
            assert json.loads(answer.body) == about | more
            assert "\r\nContent-Type: application/json\r\n" in answer.head


def test_the_page(serve: Serve) -> None:
    """GET / is the page, which holds no token; its policy lets its own script and style run, talks to its own host
    alone, and makes no HTML of texts."""
    answer = ask(serve(token=TOKEN), "Host: localhost:8282", upgrade=False)
    text, headers = answer.body.decode(), dict(re.findall(r"^([\w-]+): (.*)\r$", answer.head, re.MULTILINE))
    assert (text.startswith("<!doctype html>"), TOKEN in text) == (True, False)
    policy = dict(part.strip().partition(" ")[::2] for part in headers["Content-Security-Policy"].split(";"))
    for tag in ("script", "style"):
        (inner,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["trusted-types"] == "'none'"
    assert policy["connect-src"] == "'self' ws://localhost:8282 wss://localhost:8282"
    assert policy["require-trusted-types-for"] == "'script'"
    assert (headers["X-Content-Type-Options"], headers["Content-Type"]) == ("nosniff", "text/html; charset=utf-8")


def test_a_page_that_is_no_websocket_is_told_so(serve: Serve) -> None:
    """A page is told to upgrade; nothing is compressed; needless tokens and other subprotocols are no fault."""
    server = serve()
    answer = ask(server, "Host: localhost", path="/other", upgrade=False)
    assert (answer.status, b"WebSocket" in answer.body) == (426, True)
    extension = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits"
    for header in (extension, f"{PROTOCOL}: chat", "Authorization: Bearer any"):
        answer = ask(server, "Host: localhost", header)
        assert (answer.status, f"\n{header.split(':')[0]}" in answer.head) == (101, False)


def test_one_connection_too_many_gets_503(serve: Serve) -> None:
    """The connection above max_connections gets 503 before the upgrade; one that leaves makes room."""
    server = serve(max_connections=2)
    with Tcp(server) as first:
        assert first.ask("Host: localhost").status == 101
        with Tcp(server) as second:
            assert second.ask("Host: localhost").status == 101
            assert ask(server, "Host: localhost").status == 503
            assert ask(server, "Host: evil.example").status == 403
            second.socket.sendall(b"\x88\x80\x00\x00\x00\x00")  # a masked close frame
            assert second.rest().startswith(b"\x88")
        assert ask(server, "Host: localhost").status == 101


BREACHES: list[tuple[bytes, int]] = [
    (b"\x81\x02hi", 1002),  # not masked
    (b"\x83\x80\x00\x00\x00\x00", 1002),  # an opcode that does not exist
    (b"\xc1\x80\x00\x00\x00\x00", 1002),  # a reserved bit
    (b"\x09\x80\x00\x00\x00\x00", 1002),  # a ping in pieces
    (b"\x80\x80\x00\x00\x00\x00", 1002),  # the rest of a message that never began
    (b"\x81\x82\x00\x00\x00\x00\xc3\x28", 1007),  # not UTF-8
    (b"\x81\xff\x00\x00\x00\x00\x00\x10\x00\x01", 1009),  # the head of a frame of 1 MiB and a byte
    (b"\x81\xff\x7f\xff\xff\xff\xff\xff\xff\xff", 1009),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 0),
    (b"GET\r\n\r\n", 0),
    (b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", 0),
    (b"GET / HTTP/1.1\r\nHost localhost\r\n\r\n", 0),
    (b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 0),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 10_000 + b"\r\n\r\n", 0),
    (b"GET / HTTP/1.1\r\n" + b"X: x\r\n" * 200 + b"\r\n", 0),
]


def test_breaches_of_the_standard_close(serve: Serve) -> None:
    """What RFC 6455 forbids closes with its code; what is no HTTP (0) or too much is refused; the server goes on."""
    server = serve()
    for raw, code in BREACHES:
        with Tcp(server) as tcp:
            assert not code or tcp.ask("Host: localhost").status == 101
            tcp.socket.sendall(raw)
            answer = tcp.rest()
        if code:
            assert (answer[0], struct.unpack("!H", answer[2:4])) == (0x88, (code,))
        else:
            assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
        assert ask(server, "Host: localhost").status == 101


BEYOND_LOOPBACK = words(
    """0.0.0.0 0 0.0 00.0.0.0 0x0 0x00000000 :: [::] ::0 0:: 0:0:0:0:0:0:0:0 ::ffff:0.0.0.0 ::0.0.0.0 *
192.168.0.1 10.0.0.1 fe80::1 example.com localhost.example.com 127.0.0.1.example.com 128.0.0.1"""
)


@pytest.mark.parametrize("host", [*BEYOND_LOOPBACK, "", " 0.0.0.0 "])
def test_beyond_loopback_needs_a_token(host: str) -> None:
    """A host that lets others in, however spelled, needs a token that a header can carry; loopback needs none."""
    with pytest.raises(memws.MemwsError, match="--token"):
        memws.WebSocketServer(host=host)
    memws.WebSocketServer(host=host, token=TOKEN)
    for token in ("", " ", "two words", "tab\t", "\u20ac", "x" * 513):
        with pytest.raises(memws.MemwsError, match="token: expected"):
            memws.WebSocketServer(host=host, token=token)
    for loopback in ("localhost", "LOCALHOST", "127.0.0.1", "127.8.8.8", "::1", "[::1]"):
        memws.WebSocketServer(host=loopback)
