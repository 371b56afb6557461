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


def event(delta: dict[str, object], finish: str | None = None, usage: bool = False) -> bytes:
    """One chunk of the stream, as a server-sent event in a chunk of HTTP's."""
    chunk: dict[str, object] = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": "fake",
        "choices": [] if usage else [{"index": 0, "delta": delta, "finish_reason": finish}],
        "usage": {"prompt_tokens": 1000, "completion_tokens": 20, "total_tokens": 1020} if usage else None,
    }
    return chunked(b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n")


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def arguments(piece: str) -> bytes:
    return event({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]})


def call(name: str) -> bytes:
    function = {"name": name, "arguments": ""}
    return event({"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": function}]})


def pieces(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


_BEGIN = event({"role": "assistant", "content": ""}) + b"".join(event({"content": word}) for word in _THOUGHT)
_SAY = call("send_message") + b"".join(map(arguments, pieces('{"message": "', 4)))
_END = event({}, "tool_calls") + event({}, usage=True) + chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n"
_PLAIN = event({"role": "assistant", "content": ""}) + event({"content": "They talked, and all went well."}) + _END
_CLOSE = arguments('"}')


class Model(asyncio.Protocol):
    last = b"{}"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._got = bytearray()

    def data_received(self, data: bytes) -> None:
        self._got += data
        end = self._got.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._got[:end])
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        size = end + 4 + (int(length[1]) if length else 0)
        if len(self._got) >= size:
            body = bytes(self._got[end + 4 : size])
            del self._got[:size]
            self._answer(body)

    def _answer(self, body: bytes) -> None:
        Model.last = body
        match = _MODEL.search(body)
        kind, _, number = (match[1].decode() if match else "now").partition("-")
        at = body.rfind(b"<<")
        mark = body[at : body.find(b">>", at) + 2].decode() if at >= 0 else "<<>>"
        if b'"tools":' not in body:
            self._write(_HEAD + _PLAIN)
        elif kind == "never":
            pass
        elif kind == "tool" and body.rfind(b'"role":"tool"') < at:
            self._write(_HEAD + _BEGIN + call(number) + arguments("{}") + _END)
        else:
            said = b"".join(map(arguments, pieces(f"You said {mark}", 4)))
            answer = _HEAD + _BEGIN + _SAY + said + _CLOSE + _END
            if kind == "ms":
                asyncio.get_running_loop().call_later(int(number) / 1000, self._write, answer)
            else:
                self._write(answer)

    def _write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)
