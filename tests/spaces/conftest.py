"""Served Spaces, and a browser."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from space_tools import LOOPBACK, SPACE, free_port, made_up_points


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., SimpleNamespace]]:
    """Serves an engine, with four places in the queue: `url`, `engine`, `space`.

    From building on, the servers must look up no name but loopback's, which is checked at the end.
    """
    pytest.importorskip("gradio")
    looked_up: list[Any] = []
    served: list[Any] = []
    original = socket.getaddrinfo

    def watched(host: Any, *args: Any, **kwargs: Any) -> Any:
        if (host.decode() if isinstance(host, bytes) else host) not in LOOPBACK:
            looked_up.append(host)
        return original(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", watched)
        patch.setenv("PHASE_QUEUE", "4")
        patch.delenv("GRADIO_SERVER_PORT", raising=False)
        from phase_space.ui import build, launch

        def start(engine: Any, measurements: Any) -> SimpleNamespace:
            demo = build(engine, measurements)
            place: dict[str, Any] = {"server_name": "127.0.0.1", "server_port": free_port()}
            served.append(launch(demo, prevent_thread_lock=True, quiet=True, **place))
            return SimpleNamespace(url=demo.local_url, engine=engine, space=demo.space)

        yield start
        for demo in served:
            demo.close()
        assert looked_up == [], "the server looked up names of other machines"


@pytest.fixture(scope="module")
def served(serve) -> SimpleNamespace:
    """A Space without a model: the fake engine at 5 ms per token."""
    from phase_space.fake import FakeEngine
    from phase_space.measurements import Measurements

    return serve(FakeEngine(sleep=0.005), Measurements(made_up_points(), "made up"))


@pytest.fixture(scope="module")
def served_lab(serve) -> SimpleNamespace:
    """The Space as `python app.py` serves it: on the embedded family, with its measurements."""
    from phase_space.engine import ElasticEngine
    from phase_space.measurements import read_measurements

    engine = ElasticEngine.lab()
    file = SPACE / "data" / "measurements.json"
    return serve(engine, read_measurements(file, [size.name for size in engine.sizes]))


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
