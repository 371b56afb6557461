"""The gate of section 11: who may open a connection, decided before the upgrade, over raw TCP."""

import json
import logging
import random
import socket
import struct
from collections.abc import Callable
from typing import NamedTuple

import pytest
from websockets.datastructures import Headers
from websockets.http11 import Request

import memws

Serve = Callable[..., memws.WebSocketServer]
TOKEN = "Secret-token_1~"
UPGRADE = (
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version: 13",
)


class Answer(NamedTuple):
    """What a server answers to an HTTP request."""

    status: int
    head: str
    body: bytes


class Tcp:
    """A TCP connection to a server."""

    def __init__(self, server: memws.WebSocketServer) -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=10)

    def __enter__(self) -> "Tcp":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.socket.close()

    def ask(self, *headers: str, path: str = "/", method: str = "GET", upgrade: bool = True) -> Answer:
        """Send a request with these headers and read the answer; the body only where there is no upgrade."""
        lines = [f"{method} {path} HTTP/1.1", *headers, *(UPGRADE if upgrade else ()), "", ""]
        return self.send("\r\n".join(lines).encode("latin-1"))

    def send(self, raw: bytes) -> Answer:
        self.socket.sendall(raw)
        head = b""
        while b"\r\n\r\n" not in head:
            piece = self.socket.recv(1)
            assert piece, f"closed after {head!r}"
            head += piece
        status = int(head.split()[1])
        return Answer(status, head.decode("latin-1"), b"" if status == 101 else self.rest())

    def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        pieces = []
        while piece := self.socket.recv(65_536):
            pieces.append(piece)
        return b"".join(pieces)

    def close_code(self) -> int:
        """The code of the close frame that comes next."""
        frame = self.rest()
        assert frame[0] == 0x88
        return int(struct.unpack("!H", frame[2:4])[0])


def ask(
    server: memws.WebSocketServer, *headers: str, path: str = "/", method: str = "GET", upgrade: bool = True
) -> Answer:
    """The answer to one request on a connection of its own; it may be one that opens a WebSocket."""
    with Tcp(server) as tcp:
        return tcp.ask(*headers, path=path, method=method, upgrade=upgrade)


def status(server: memws.WebSocketServer, *headers: str, path: str = "/") -> int:
    return ask(server, *headers, path=path).status


# ---- hosts -----------------------------------------------------------------------------------------------------------

GOOD_HOSTS = ["127.0.0.1", "localhost", "LocalHost:1", "127.0.0.1:65535", "[::1]", "[::1]:8282"]
BAD_HOSTS = [
    "",
    "evil.example",
    "localhost.evil.example",
    "evil.example:8282",
    "localhost.",
    "localhost.:8282",
    "127.0.0.1.",
    "127.0.0.1.nip.io",
    "127.0.0.1:",
    "127.0.0.1:99999",
    "127.0.0.1:65536",
    "127.0.0.1:-1",
    "127.0.0.1:8282:8282",
    "127.0.0.1:port",
    "127.0.0.1:\xb2",
    "user@localhost",
    "user:password@127.0.0.1",
    "localhost@evil.example",
    "localhost/",
    "localhost#",
    "localhost?",
    "localhost\\",
    "http://localhost",
    "localhost, evil.example",
    "localhost evil.example",
    "::1",
    "::1:8282",
    "[::1",
    "::1]",
    "[]",
    "[::1]x",
    "[::1]:",
    "[::1]]",
    "[[::1]]",
    "[::1%lo]",
    "[::1%25lo]",
    "[0:0:0:0:0:0:0:1]",
    "[::ffff:127.0.0.1]",
    "[::]",
    "[localhost]",
    "0.0.0.0",  # noqa: S104
    "0",
    "127.1",
    "2130706433",
    "0x7f000001",
    "0177.0.0.1",
    "192.168.0.1",
    "[fe80::1]",
    "null",
    "*",
    "lo\xe7alhost",
    "x" * 5_000,
]


def test_right_hosts_pass(serve: Serve) -> None:
    """Loopback names pass as Host, in any case and with any port."""
    server = serve()
    for host in GOOD_HOSTS:
        assert (host, status(server, f"Host: {host}")) == (host, 101)


def test_foreign_hosts_get_403(serve: Serve) -> None:
    """Any other Host, malformed ones too, gets 403 before the upgrade, with or without a right token."""
    server = serve(token=TOKEN, allow_host=["lab.example"])
    with_token = serve(token=TOKEN, db=":memory:")
    for host in BAD_HOSTS:
        if host not in ("0.0.0.0", "192.168.0.1", "[fe80::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]"):  # noqa: S104
            for each in (server, with_token):
                assert (host, status(each, f"Host: {host}", f"Authorization: Bearer {TOKEN}")) == (host, 403)


def test_without_a_token_no_address_is_right(serve: Serve) -> None:
    """Without a token only the loopback names are right: every other spelling and address gets 403."""
    server = serve()
    for host in BAD_HOSTS:
        assert (host, status(server, f"Host: {host}")) == (host, 403)


def test_with_a_token_addresses_are_right(serve: Serve) -> None:
    """Where a token is set any IP literal passes as Host, since no page can make a browser send the token."""
    server = serve(token=TOKEN)
    for host in ("192.168.0.1", "10.0.0.7:1234", "[2001:db8::1]", "[fe80::1]:8282"):
        assert (host, status(server, f"Host: {host}", f"Authorization: Bearer {TOKEN}")) == (host, 101)
        assert (host, status(server, f"Host: {host}")) == (host, 401)
    for host in ("evil.example", "300.0.0.1", "1.2.3", "[2001:db8::1", "[2001:db8::g]"):
        assert (host, status(server, f"Host: {host}", f"Authorization: Bearer {TOKEN}")) == (host, 403)


def test_allowed_hosts_pass(serve: Serve) -> None:
    """Names of allow_host and the hosts of allow_origin pass as Host, in any case and with any port."""
    server = serve(allow_host=["lab.example", "Other.Example:80"], allow_origin=["https://pages.example:8443"])
    for host in ("lab.example", "LAB.example:7", "other.example", "other.example:81", "pages.example", "localhost"):
        assert (host, status(server, f"Host: {host}")) == (host, 101)
    for host in ("sub.lab.example", "lab.example.", "example", "https://pages.example"):
        assert (host, status(server, f"Host: {host}")) == (host, 403)


@pytest.mark.parametrize("hosts", [[], ["localhost", "localhost"], ["localhost", "evil.example"]])
def test_no_or_several_hosts_get_400(serve: Serve, hosts: list[str]) -> None:
    """A request without a Host, or with several, gets 400, for a health check too."""
    server = serve()
    headers = [f"Host: {host}" for host in hosts]
    assert status(server, *headers) == 400
    assert status(server, *headers, path="/healthz") == 400


def test_the_address_it_is_bound_to_is_right() -> None:
    """A server on another loopback address is reached under that address."""
    gate = memws.Gate(memws.Options(host="127.0.0.2"))
    assert gate.refuse(Request("/", Headers(Host="127.0.0.2:8282"))) is None
    assert gate.refuse(Request("/", Headers(Host="127.0.0.3:8282"))) is not None


def test_an_address_may_be_allowed_with_or_without_brackets() -> None:
    """allow_host takes an IPv6 address as people write it, with or without its brackets."""
    for name in ("2001:db8::1", "[2001:db8::1]"):
        gate = memws.Gate(memws.Options(allow_host=(name,)))
        assert gate.refuse(Request("/", Headers(Host="[2001:db8::1]:8282"))) is None


# ---- origins ---------------------------------------------------------------------------------------------------------

GOOD_ORIGINS = [
    "http://localhost:8888",
    "https://127.0.0.1",
    "http://[::1]:9",
    "HTTP://LOCALHOST",
    "http://localhost:65535",
]
BAD_ORIGINS = [
    "",
    "null",
    "NULL",
    "*",
    "localhost",
    "//localhost",
    "http:",
    "http://",
    "http:///",
    "http:/localhost",
    "http:localhost",
    "http://evil.example",
    "https://localhost.evil.example",
    "http://127.0.0.1.nip.io",
    "http://localhost@evil.example",
    "http://evil.example@localhost",
    "http://user:password@localhost",
    "http://localhost.",
    "http://localhost/",
    "http://localhost:8888/",
    "http://localhost/page",
    "http://localhost?",
    "http://localhost#",
    "http://localhost\\@evil.example",
    "http://localhost:",
    "http://localhost:99999",
    "http://localhost:-1",
    "http://localhost:http",
    "http://[::1",
    "http://::1",
    "http://[::1%lo]",
    "http://[0:0:0:0:0:0:0:1]",
    "http://127.1",
    "http://0.0.0.0",
    "http://192.168.0.1",
    "http://localhost http://localhost",
    "http://localhost,http://localhost",
    "file://",
    "file://localhost",
    "ws://localhost",
    "ftp://localhost",
    "chrome-extension://abcdefghijklmnop",
    "javascript:alert(1)",
    "data:text/html,x",
    "http://lo\xe7alhost",
    "http://" + "x" * 5_000,
]


def test_right_origins_pass(serve: Serve) -> None:
    """Pages of loopback names may connect, whatever their port, and so may scripts, which send no Origin."""
    server = serve()
    assert status(server, "Host: localhost") == 101
    for origin in GOOD_ORIGINS:
        assert (origin, status(server, "Host: localhost", f"Origin: {origin}")) == (origin, 101)


def test_foreign_origins_get_403(serve: Serve) -> None:
    """Pages of any other Origin, null and malformed ones too, get 403 before the upgrade."""
    server = serve()
    for origin in BAD_ORIGINS:
        assert (origin, status(server, "Host: localhost", f"Origin: {origin}")) == (origin, 403)


def test_a_token_does_not_open_the_gate_to_foreign_origins(serve: Serve) -> None:
    """A page of a foreign Origin gets 403 even with the right token; one of an address passes with it."""
    server = serve(token=TOKEN)
    token = f"Authorization: Bearer {TOKEN}"
    for origin in ("http://evil.example", "null", "http://localhost:99999"):
        assert status(server, "Host: localhost", f"Origin: {origin}", token) == 403
    assert status(server, "Host: localhost", "Origin: http://192.168.0.1:8888", token) == 101
    assert status(server, "Host: localhost", "Origin: http://192.168.0.1:8888") == 401


@pytest.mark.parametrize("second", ["http://localhost", "http://evil.example"])
def test_several_origins_get_403(serve: Serve, second: str) -> None:
    """A request with two Origins gets 403, even where both were right."""
    assert status(serve(), "Host: localhost", "Origin: http://localhost", f"Origin: {second}") == 403


def test_allowed_origins_pass(serve: Serve) -> None:
    """Origins of allow_origin pass, in any case, and so do other ports of their hosts; nothing else does."""
    server = serve(allow_origin=["https://Lab.example:8443/", "chrome-extension://abcdef"])
    for origin in (
        "https://lab.example:8443",
        "https://LAB.example:8443",
        "https://lab.example",
        "chrome-extension://abcdef",
    ):
        assert (origin, status(server, "Host: localhost", f"Origin: {origin}")) == (origin, 101)
    for origin in ("https://sub.lab.example", "https://lab.example.evil.example", "chrome-extension://abcdefg", "null"):
        assert (origin, status(server, "Host: localhost", f"Origin: {origin}")) == (origin, 403)


def test_the_gate_never_raises() -> None:
    """Whatever Host, Origin, token and path a request has, the gate decides; a foreign one never passes."""
    pick = random.Random(5)
    gate = memws.Gate(memws.Options(token=TOKEN, allow_host=("lab.example",)))
    pieces = [
        "http",
        "https",
        "://",
        ":",
        "//",
        "[",
        "]",
        "::1",
        "%",
        "@",
        ".",
        ",",
        "evil",
        "99999",
        "ÿ",
        "²",
        "\xa0",
        "\\",
        "?",
        "#",
        "memws",
        "Bearer",
        "%ff",
        "%00",
        "+",
        "&token=",
    ]
    for _ in range(20_000):
        text = "".join(pick.choices(pieces, k=pick.randint(0, 8)))
        shown = pick.choice(["Authorization", "Sec-WebSocket-Protocol"])
        headers = Headers({"Host": pick.choice(["localhost", text]), "Origin": f"evil{text}", shown: f"memws, {text}"})
        refused = gate.refuse(Request(f"/?token={text}", headers))
        assert refused is not None
        assert refused[0] == 403


# ---- tokens ----------------------------------------------------------------------------------------------------------

RIGHT_TOKENS = [
    ([f"Authorization: Bearer {TOKEN}"], "/"),
    ([f"Authorization: bearer {TOKEN}"], "/"),
    ([f"Sec-WebSocket-Protocol: memws, {TOKEN}"], "/"),
    ([f"Sec-WebSocket-Protocol: memws,{TOKEN}"], "/"),
    (["Sec-WebSocket-Protocol: memws", f"Sec-WebSocket-Protocol: {TOKEN}"], "/"),
    ([], f"/?token={TOKEN}"),
    ([], f"/chat?x=1&token={TOKEN}"),
    ([], "/?token=Secret%2Dtoken_1~"),
    (["Authorization: Bearer wrong"], f"/?token={TOKEN}"),
]
WRONG_TOKENS = [
    ([], "/"),
    (["Authorization: Bearer"], "/"),
    (["Authorization: Bearer "], "/"),
    (["Authorization: Bearer wrong"], "/"),
    ([f"Authorization: Bearer {TOKEN[:-1]}"], "/"),
    ([f"Authorization: Bearer {TOKEN}x"], "/"),
    ([f"Authorization: Bearer {TOKEN.upper()}"], "/"),
    ([f"Authorization: Basic {TOKEN}"], "/"),
    ([f"Authorization: {TOKEN}"], "/"),
    ([f"Authorization: Bearer {TOKEN}, {TOKEN}"], "/"),
    (["Authorization: Bearer \xe9\xff"], "/"),
    (["Authorization: Bearer " + "x" * 7_000], "/"),
    (["Sec-WebSocket-Protocol: memws"], "/"),
    ([f"Sec-WebSocket-Protocol: {TOKEN}"], "/"),
    ([f"Sec-WebSocket-Protocol: chat, {TOKEN}"], "/"),
    (["Sec-WebSocket-Protocol: memws, wrong"], "/"),
    ([], "/?token="),
    ([], "/?token"),
    ([], "/?token=wrong"),
    ([], f"/?Token={TOKEN}"),
    ([], f"/?xtoken={TOKEN}"),
    ([], f"/{TOKEN}"),
    ([], f"/token={TOKEN}"),
    ([], "/?token=%ff%00"),
    ([], "/?token=%"),
    ([f"Cookie: token={TOKEN}"], "/"),
]


def test_right_tokens_pass(serve: Serve) -> None:
    """A token passes as Authorization: Bearer, as subprotocol memws and as ?token=."""
    server = serve(token=TOKEN)
    for headers, path in RIGHT_TOKENS:
        assert (headers, path, status(server, "Host: localhost", *headers, path=path)) == (headers, path, 101)


def test_wrong_tokens_get_401(serve: Serve) -> None:
    """No token, and one that is not the very token, get 401 before the upgrade, and the token is not told."""
    server = serve(token=TOKEN)
    for headers, path in WRONG_TOKENS:
        answer = ask(server, "Host: localhost", *headers, path=path)
        assert (headers, path, answer.status) == (headers, path, 401)
        assert TOKEN not in answer.head + answer.body.decode()
        assert len(answer.body) < 1_000


def test_the_subprotocol_is_told_without_the_token(serve: Serve) -> None:
    """A client that offers the subprotocol memws and a token gets memws back, never the token."""
    head = ask(serve(token=TOKEN), "Host: localhost", f"Sec-WebSocket-Protocol: memws, {TOKEN}").head
    assert "Sec-WebSocket-Protocol: memws\r\n" in head
    assert TOKEN not in head


def test_without_a_token_none_is_asked_for(serve: Serve) -> None:
    """A server without a token takes clients that send one all the same, and offers of other subprotocols."""
    server = serve()
    assert status(server, "Host: localhost", "Authorization: Bearer any") == 101
    answer = ask(server, "Host: localhost", "Sec-WebSocket-Protocol: chat")
    assert (answer.status, "Sec-WebSocket-Protocol" in answer.head) == (101, False)


@pytest.mark.parametrize("token", ["", " ", "two words", "tab\t", "\u20ac", "x" * 513])
def test_a_token_is_printable(token: str) -> None:
    """A token that a header could not carry is refused when the server is made."""
    with pytest.raises(memws.MemwsError) as caught:
        memws.WebSocketServer(token=token)
    assert "token: expected" in str(caught.value)


def test_no_token_in_logs_and_reprs(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """Neither the logs, down to DEBUG, nor a repr hold the token, however it came."""
    caplog.set_level(logging.DEBUG)
    server = serve(token=TOKEN)
    for headers, path in (*RIGHT_TOKENS, *WRONG_TOKENS):
        status(server, "Host: localhost", *headers, path=path)
    assert TOKEN not in repr(server)
    server.stop()
    assert TOKEN not in caplog.text


# ---- health, methods, limits -----------------------------------------------------------------------------------------


def test_healthz_needs_the_right_host_only(serve: Serve) -> None:
    """GET /healthz tells status and version, also without a token and where all connections are taken."""
    server = serve(token=TOKEN, max_connections=1)
    with Tcp(server) as first:
        assert first.ask("Host: localhost", f"Authorization: Bearer {TOKEN}").status == 101
        for path in ("/healthz", "/healthz?verbose=1"):
            answer = ask(server, "Host: localhost", path=path, upgrade=False)
            assert answer.status == 200
            assert "\r\nContent-Type: application/json\r\n" in answer.head
            assert json.loads(answer.body) == {"status": "ok", "version": memws.__version__}
    assert ask(server, "Host: evil.example", path="/healthz", upgrade=False).status == 403


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
@pytest.mark.parametrize("path", ["/healthz", "/"])
def test_other_methods_get_405(serve: Serve, method: str, path: str) -> None:
    """Another method than GET gets 405, behind the Host check."""
    server = serve()
    assert ask(server, "Host: localhost", path=path, method=method, upgrade=False).status == 405
    assert ask(server, "Host: evil.example", path=path, method=method, upgrade=False).status == 403


def test_a_page_that_is_no_websocket_is_told_so(serve: Serve) -> None:
    """A browser that opens the port as a page is told to upgrade."""
    answer = ask(serve(), "Host: localhost", upgrade=False)
    assert answer.status == 426
    assert b"WebSocket" in answer.body


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


def test_nothing_is_compressed(serve: Serve) -> None:
    """Compression is not agreed to, also where a client offers it."""
    answer = ask(serve(), "Host: localhost", "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits")
    assert (answer.status, "Sec-WebSocket-Extensions" in answer.head) == (101, False)


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"\x81\x02hi", 1002),  # not masked
        (b"\x83\x80\x00\x00\x00\x00", 1002),  # an opcode that does not exist
        (b"\xc1\x80\x00\x00\x00\x00", 1002),  # a reserved bit
        (b"\x09\x80\x00\x00\x00\x00", 1002),  # a ping in pieces
        (b"\x80\x80\x00\x00\x00\x00", 1002),  # the rest of a message that never began
        (b"\x81\x82\x00\x00\x00\x00\xc3\x28", 1007),  # not UTF-8
        (b"\x81\xff\x00\x00\x00\x00\x00\x10\x00\x01", 1009),  # the head of a frame of 1 MiB and a byte
        (b"\x81\xff\x7f\xff\xff\xff\xff\xff\xff\xff", 1009),
    ],
)
def test_breaches_of_the_standard_close(serve: Serve, raw: bytes, code: int) -> None:
    """What RFC 6455 forbids closes the connection with its code; the server goes on."""
    server = serve()
    with Tcp(server) as tcp:
        tcp.ask("Host: localhost")
        tcp.socket.sendall(raw)
        assert tcp.close_code() == code
    assert status(server, "Host: localhost") == 101


def test_what_is_no_http_is_refused(serve: Serve) -> None:
    """Bytes that are no HTTP request, or far too much of one, are refused without harm to the server."""
    server = serve()
    for raw in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost localhost\r\n\r\n",
        b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 10_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: x\r\n" * 200 + b"\r\n",
    ):
        with Tcp(server) as tcp:
            tcp.socket.sendall(raw)
            answer = tcp.rest()
            assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert status(server, "Host: localhost") == 101


# ---- binding ---------------------------------------------------------------------------------------------------------

BEYOND_LOOPBACK = [
    "0.0.0.0",  # noqa: S104
    "0",
    "0.0",
    "00.0.0.0",
    "0x0",
    "0x00000000",
    "::",
    "[::]",
    "::0",
    "0::",
    "0:0:0:0:0:0:0:0",
    "::ffff:0.0.0.0",
    "::0.0.0.0",
    "",
    "*",
    " 0.0.0.0 ",
    "192.168.0.1",
    "10.0.0.1",
    "fe80::1",
    "example.com",
    "localhost.example.com",
    "127.0.0.1.example.com",
    "128.0.0.1",
]


@pytest.mark.parametrize("host", BEYOND_LOOPBACK)
def test_beyond_loopback_needs_a_token(host: str) -> None:
    """A host that lets other machines in, in any spelling, is refused without a token, with what to do about it."""
    with pytest.raises(memws.MemwsError) as caught:
        memws.WebSocketServer(host=host)
    assert "--token" in str(caught.value)
    memws.WebSocketServer(host=host, token=TOKEN)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "127.0.0.1", "127.8.8.8", "::1", "[::1]"])
def test_loopback_needs_no_token(host: str) -> None:
    """A loopback host needs no token."""
    memws.WebSocketServer(host=host)


def test_with_a_token_all_addresses_may_be_bound(serve: Serve) -> None:
    """A server on all addresses takes clients that show its token, under any of them."""
    server = serve(host="0.0.0.0", token=TOKEN)  # noqa: S104
    assert status(server, f"Host: 127.0.0.1:{server.port}", f"Authorization: Bearer {TOKEN}") == 101
    assert status(server, f"Host: 127.0.0.1:{server.port}") == 401


def test_localhost_is_both_families(serve: Serve) -> None:
    """localhost is 127.0.0.1 and, where this machine has it, ::1 on the same port; the url names the former."""
    server = serve(host="localhost")
    assert server.url == f"ws://127.0.0.1:{server.port}"
    assert status(server, "Host: localhost") == 101
    try:
        probe = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        return
    probe.close()
    with socket.create_connection(("::1", server.port), timeout=10) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: [::1]\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
