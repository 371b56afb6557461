"""A fake OpenAI-compatible endpoint that costs little: answers are put together from bytes, requests hardly read.

The model's name says what it does: `now` answers at once, `ms-200` after 200 ms, `never` not at all, `tool-compute`
first calls that tool. Each answer goes through send_message and repeats the last mark <<…>> of the request, so that a
delivery to the wrong client can be seen; without tools it is plain text. `Model.last` is the body of the last request.
"""

import asyncio
import json
import re

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
_MODEL = re.compile(rb'"model": ?"([^"]+)"')
_THOUGHT = ("I ", "greet ", "the ", "user ", "and ", "keep ", "it ", "short", ".")


def event(**fields: object) -> bytes:
    """One chunk of the stream, as a server-sent event in a chunk of HTTP's."""
    common = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": "fake"}
    chunk = common | {"usage": None, **fields}
    return chunked(b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n")


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def delta(finish: str | None = None, **fields: object) -> bytes:
    return event(choices=[{"index": 0, "delta": fields, "finish_reason": finish}])


def arguments(text: str) -> bytes:
    """Arguments of a call in pieces of four characters."""
    pieces = [text[start : start + 4] for start in range(0, len(text), 4)]
    return b"".join(delta(tool_calls=[{"index": 0, "function": {"arguments": piece}}]) for piece in pieces)


def call(name: str) -> bytes:
    function = {"name": name, "arguments": ""}
    return delta(tool_calls=[{"index": 0, "id": "call_1", "type": "function", "function": function}])


_FIRST = delta(role="assistant", content="")
_BEGIN = _FIRST + b"".join(delta(content=word) for word in _THOUGHT)
_SAY = call("send_message") + arguments('{"message": "')
_USAGE = event(choices=[], usage={"prompt_tokens": 1000, "completion_tokens": 20, "total_tokens": 1020})
_END = delta("tool_calls") + _USAGE + chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n"
_PLAIN = _FIRST + delta(content="They talked, and all went well.") + _END


class Model(asyncio.Protocol):
    last = b"{}"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self._got = transport, b""

    def data_received(self, data: bytes) -> None:
        self._got += data
        head, end, body = self._got.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        if end and len(body) >= int(length[1] if length else 0):
            self._got = b""
            self._answer(body)

    def _answer(self, body: bytes) -> None:
        Model.last = body
        match = _MODEL.search(body)
        kind, _, number = (match[1].decode() if match else "now").partition("-")
        at = body.rfind(b"<<")
        mark = body[at : body.find(b">>", at) + 2].decode() if at >= 0 else "<<>>"
        if b'"tools":' not in body:
            self._write(_HEAD + _PLAIN)
        elif kind == "tool" and body.rfind(b'"role":"tool"') < at:
            self._write(_HEAD + _BEGIN + call(number) + arguments("{}") + _END)
        elif kind != "never":
            answer = _HEAD + _BEGIN + _SAY + arguments(f'You said {mark}"}}') + _END
            pause = int(number) / 1000 if kind == "ms" else 0
            asyncio.get_running_loop().call_later(pause, self._write, answer)

    def _write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)
