"""A served Space without a model, and a browser."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from space_tools import LOOPBACK, free_port, made_up_points


@pytest.fixture(scope="module")
def served() -> Iterator[SimpleNamespace]:
    """A Space with a fake engine of 5 ms per token and four places in its queue: `url`, `engine`, `space`.

    From building on it must look up no name but loopback's, which is checked at the end.
    """
    pytest.importorskip("gradio")
    looked_up: list[Any] = []
    original = socket.getaddrinfo

    def watched(host: Any, *args: Any, **kwargs: Any) -> Any:
        if (host.decode() if isinstance(host, bytes) else host) not in LOOPBACK:
            looked_up.append(host)
        return original(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", watched)
        patch.setenv("PHASE_QUEUE", "4")
        patch.delenv("GRADIO_SERVER_PORT", raising=False)
        from phase_space.fake import FakeEngine
        from phase_space.measurements import Measurements
        from phase_space.ui import build, launch

        engine = FakeEngine(sleep=0.005)
        demo = launch(
            build(engine, Measurements(made_up_points(), "made up")),
            prevent_thread_lock=True,
            quiet=True,
            server_name="127.0.0.1",
            server_port=free_port(),
        )
        yield SimpleNamespace(url=demo.local_url, engine=engine, space=demo.space)
        demo.close()
        assert looked_up == [], "the server looked up names of other machines"


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
