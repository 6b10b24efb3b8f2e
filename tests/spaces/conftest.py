"""The Space's own package on the path, a served Space without a model, and a browser."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

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
    about = {"n": 50, "tokens": 60.0, "device": "cpu", "dtype": "float32", "commit": "0" * 12, "seconds": None}
    return [
        {"plan": PhasePlan(t, a, max_thinking_tokens=cap).to_dict(), "thinking": t, "answering": a, "accuracy": accuracy,
         "cost": cost, "max_thinking_tokens": cap, **about}
        for t, a, accuracy, cost, cap in rows
    ]  # fmt: skip


@pytest.fixture(scope="module")
def served() -> Iterator[SimpleNamespace]:
    """A Space with a fake engine of 5 ms per token and four places in its queue: `url`, `engine`, `space`, names that were `looked_up`."""
    gradio = pytest.importorskip("gradio")
    looked_up: list[Any] = []
    original = socket.getaddrinfo

    def watched(host: Any, *args: Any, **kwargs: Any) -> Any:
        if (host.decode() if isinstance(host, bytes) else host) not in LOOPBACK:
            looked_up.append(host)
        return original(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", watched)
        for setting in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):  # gradio's client asks the Hub, not the Space
            patch.setattr(f"huggingface_hub.constants.{setting}", True)
        patch.setenv("PHASE_QUEUE", "4")
        patch.delenv("GRADIO_SERVER_PORT", raising=False)
        from phase_space.fake import FakeEngine
        from phase_space.ui import build, launch

        assert gradio is not None
        engine = FakeEngine(sleep=0.005)
        demo = launch(
            build(engine, made_up_points()),
            prevent_thread_lock=True,
            quiet=True,
            server_name="127.0.0.1",
            server_port=free_port(),
        )
        yield SimpleNamespace(url=demo.local_url, engine=engine, space=demo.space, looked_up=looked_up)
        demo.close()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser. Without one its tests are skipped, or fail where `HF_ELASTIC_REQUIRE_BROWSER=1` says that there has to be one (CI)."""
    pytest.importorskip("playwright")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        if os.environ.get("HF_ELASTIC_REQUIRE_BROWSER") == "1":
            pytest.fail("no chromium: apt-get install chromium, or unset HF_ELASTIC_REQUIRE_BROWSER")
        pytest.skip("no chromium: apt-get install chromium")
    return found
