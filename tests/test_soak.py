"""The soak scripts with small counts: every figure of theirs is met but for times, which are for a quiet machine."""

import importlib
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).with_name("soak")
sys.path.append(str(SCRIPTS))

COUNTS = {"hostile": 2_000, "clients": 3, "model_faults": 10, "readers": 4, "lagging": 40}
COUNTS |= {"disk_faults": 20, "injection": 40, "servers": 1, "forks": 2}


@pytest.mark.anyio
@pytest.mark.parametrize("name", COUNTS)
async def test_every_figure_is_met(name: str, request: pytest.FixtureRequest) -> None:
    """A small run of each script misses none of its figures."""
    if name == "servers":
        request.getfixturevalue("postgres")  # else it is skipped
    script, soaking = importlib.import_module(name), importlib.import_module("soaking")
    soak = soaking.Soak(script.WHAT, script.COUNT, COUNTS[name])
    await script.main(soak)
    soak.finish()
    assert soak.missed == []


def test_every_script_is_run_here() -> None:
    assert {path.stem for path in SCRIPTS.glob("*.py")} - {"soaking", "serving"} == COUNTS.keys()
