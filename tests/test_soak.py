"""The soak scripts with small counts: every figure of theirs is met but for times, which are for a quiet machine."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).with_name("soak")
sys.path.append(str(SCRIPTS))

import disk_faults  # noqa: E402 (the scripts are found by the path that is set first)
import gate  # noqa: E402
import hostile  # noqa: E402
import injection  # noqa: E402
import kills  # noqa: E402
import model_faults  # noqa: E402
import readers  # noqa: E402
import resends  # noqa: E402
import signals  # noqa: E402
from soaking import Soak  # noqa: E402

COUNTS = {
    hostile: 2_000,
    gate: 300,
    kills: 4,
    model_faults: 33,
    resends: 10,
    readers: 4,
    signals: 4,
    disk_faults: 20,
    injection: 40,
}


@pytest.mark.anyio
@pytest.mark.parametrize("script", COUNTS, ids=lambda script: script.__name__)
async def test_every_figure_is_met(script: ModuleType) -> None:
    """A small run of each script misses none of its figures."""
    soak = Soak(script.WHAT, script.COUNT, COUNTS[script])
    await script.main(soak)
    soak.finish()
    assert soak.missed == []


def test_every_script_is_run_here() -> None:
    """No script is left out."""
    scripts = {path.stem for path in SCRIPTS.glob("*.py")} - {"soaking"}
    assert scripts == {script.__name__ for script in COUNTS}
