"""What the tests of Spaces share."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SPACE = Path(__file__).parents[2] / "spaces" / "phase_plans"
sys.path.insert(0, str(SPACE))
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

LOOPBACK = {"127.0.0.1", "localhost", "::1", "0.0.0.0", "", None}


def made_up_points() -> list[dict[str, Any]]:
    """Measurements for the fake engine's sizes; the second is beaten by the first, the fourth has a cap."""
    from hf_elastic import PhasePlan

    rows = [
        ("XS", "XS", 0.5, 10, None),
        ("S", "XS", 0.45, 12, None),
        ("XS", "L", 0.8, 20, None),
        ("M", "M", 0.9, 40, 32),
    ]
    about = {"n": 50, "thinking_tokens": 48.0, "answer_tokens": 12.0, "device": "cpu", "dtype": "float32"}
    return [
        {"plan": PhasePlan(t, a, max_thinking_tokens=cap).to_dict(), "thinking": t, "answering": a, "accuracy": accuracy,
         "cost": cost, "max_thinking_tokens": cap, **about}
        for t, a, accuracy, cost, cap in rows
    ]  # fmt: skip


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_until(condition: Callable[[], Any], page: Any = None, seconds: float = 20.0) -> None:
    """Waits for a state; with a page the browser goes on meanwhile."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        page.wait_for_timeout(20) if page else time.sleep(0.02)
