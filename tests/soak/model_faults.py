"""Faults of the model's side: python tests/soak/model_faults.py [--seed N] [--count N]

The trials of test_misbehaviour.py, drawn anew by each seed, and endpoints that hang: answers of more than twenty kinds,
at any step of a turn that may be stopped or killed. After each of them the agent must take a plain turn.
"""

import asyncio
import logging

import hypothesis
import soaking
from soaking import Soak
from test_misbehaviour import BOUNDED, Trial, answers, bench_on, failures, slow, windows, wrongs

WHAT, COUNT = "faults of the model", 1_000
FAULTS = "turns that do not end once, requests refused, no more talk"
PATIENCE = 0.1  # seconds with a model that says nothing; a plain turn has more


def try_all(soak: Soak) -> None:
    """As many examples as the count says, up to the first that fails."""
    with bench_on(":memory:", PATIENCE) as bench:

        @hypothesis.seed(soak.seed)
        @hypothesis.settings(max_examples=soak.count, phases=[hypothesis.Phase.generate], **BOUNDED)
        @hypothesis.given(windows, wrongs(answers | failures | slow))
        def example(window: int, wrong: list[Trial]) -> None:
            bench.runner.run(bench.example(window, wrong))
            soak.step()

        try:
            example()
        except Exception as error:  # whatever it is, an example failed
            causes = [f"{each!r:.900}" for each in getattr(error, "exceptions", (error,))]
            soak.fault(FAULTS, "\n".join([*causes, *getattr(error, "__notes__", ())]))


async def main(soak: Soak) -> None:
    soak.none(FAULTS)
    await asyncio.to_thread(try_all, soak)


if __name__ == "__main__":
    logging.disable()  # of what becomes of each fault
    soaking.run(main, WHAT, COUNT)
