"""The Space. `python app.py` serves the embedded lab; see README.md for what the environment can change."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

try:  # before torch
    import spaces

    GPU: Any = spaces.GPU
except (ImportError, AttributeError):  # not on Spaces; a folder named `spaces` may pass for the package

    def GPU(duration: Any = None) -> Any:
        return lambda function: function


from phase_space.asking import Ask
from phase_space.engine import load_engine, seconds_needed
from phase_space.measurements import read_measurements
from phase_space.ui import build, launch

engine = load_engine()
lab = Path(__file__).parent / "data" / "measurements.json" if engine.task else None
file = os.environ.get("PHASE_MEASUREMENTS", lab)


@GPU(duration=seconds_needed)
def borrowed(ask: Ask) -> Any:
    """On ZeroGPU this runs in a process of its own; what goes in and out is plain values."""
    yield from engine.stream(ask)


def stream(ask: Ask) -> Any:
    """A request; no GPU is borrowed for one that cannot be run."""
    engine.check(ask)
    yield from borrowed(ask)


measured = read_measurements(Path(file), [size.name for size in engine.sizes]) if file else None
demo = build(engine, measured, stream)

if __name__ == "__main__":
    launch(demo)
