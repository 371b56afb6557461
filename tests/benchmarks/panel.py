"""What the notebook panel costs, in a real JupyterLab and headless Chromium: python tests/benchmarks/panel.py

Prints the messages lost of 40 that are written and sent as fast as the browser can, and, for a reply of 1,500 tokens
at 200 a second after 200 old items, the pushes a second, the bytes that reach the browser, and the time from the end of
the turn until its last token is on the screen.
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).absolute().parents[level]) for level in (1, 2)]

from lab import Lab, wait_until  # noqa: E402
from paced import Paced  # noqa: E402

TOKENS, RATE, OLD = 1_500, 200, 100


def lost_messages(lab: Lab, by: str) -> None:
    """40 messages, sent without any pause."""
    with Paced() as server:
        page = lab.open(f"sends-{by}", f"import memws\nmemws.Panel({server.url!r})")
        page.run()
        page.await_agent()
        began = time.monotonic()
        for number in range(40):
            page.say(f"message number {number} of forty", by)
        took = time.monotonic() - began
        time.sleep(2)
        sent = [f"message number {number} of forty" for number in range(40)]
        order = "in order" if server.said == [text for text in sent if text in server.said] else "OUT OF ORDER"
        print(f"sent by {by}, {40 / took:.0f} a second: {40 - len(server.said)} of 40 lost, the others {order}")
        page.close()


def streaming(lab: Lab) -> None:
    """A long reply in small tokens."""
    text = "".join(f"w{number:04} " for number in range(TOKENS)) + "and that was the last token"
    with Paced() as server:
        server.remember(OLD)
        page = lab.open("stream", f"import memws\nmemws.Panel({server.url!r})")
        page.run()
        page.await_agent()
        page.await_text(f"answer {OLD - 1}")
        page.page.evaluate(
            "() => { window.seen = 0; const log = document.querySelector('.memws-log'); new MutationObserver(() => {"
            "if (!window.seen && log.textContent.includes('the last token')) window.seen = Date.now() })"
            ".observe(log, {subtree: true, childList: true, characterData: true}) }"
        )
        page.pushes.clear()
        began = time.time()
        server.play(text, rate=RATE, size=6)
        wait_until(lambda: page.page.evaluate("window.seen") > 0)
        took = server.ended_at - began
        late = page.page.evaluate("window.seen") - server.ended_at * 1000
        shown = page.panel.locator(".memws-log").inner_text()
        lost = sum(f"w{number:04}" not in shown for number in range(TOKENS))
        size = sum(length for _, length in page.pushes)
        print(f"{TOKENS} tokens at {RATE} a second after {2 * OLD} items: {lost} tokens lost")
        print(f"{len(page.pushes) / took:.0f} pushes a second, {size / 1e6:.2f} MB to the browser")
        print(f"the last token is shown {late:.0f} ms after the turn's end")
        page.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        running = Lab(Path(folder))
        try:
            lost_messages(running, "click")
            lost_messages(running, "enter")
            streaming(running)
        finally:
            running.close()
