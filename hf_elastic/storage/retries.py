"""Errors that pass: a server that is busy, a connection that breaks. What failed by one is tried again, a few times."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import sleep
from typing import TypeVar

from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RevisionResolutionError,
)

logger = logging.getLogger(__name__)

TRIES = 5
WAIT = 0.5
"""Seconds before the second try, then twice as long each time."""
CONNECTING = 3
_UNCONNECTED = ("ConnectError", "ConnectTimeout", "ProxyError")
"""Of the HTTP library, which the Hub's client has changed before."""
_PASSING_STATUS = (408, 425, 429)
_T = TypeVar("_T")


def passes(error: BaseException) -> bool:
    """Whether an error of the Hub's client may be gone the next time.

    The errors of its HTTP library have no base class that is sure to stay, so what is known to last is told from the rest.
    """
    if isinstance(
        error, EntryNotFoundError
    ):  # if it was the connection, the client tried again itself before it said so
        return False
    if isinstance(error, RevisionResolutionError):  # did not try again; says what it failed by
        return error.__cause__ is not None and passes(error.__cause__)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code in _PASSING_STATUS
    if isinstance(error, OfflineModeIsEnabled | ValueError | TypeError):
        return False
    if isinstance(error, OSError):  # one with a number is of this machine, such as a full disk
        return error.errno is None
    return isinstance(error, Exception)


def never_connected(error: BaseException) -> bool:
    """Whether there was no connection at all: no network, an address that is none, a proxy that refuses."""
    chain: BaseException | None = error
    while chain is not None:
        if type(chain).__name__ in _UNCONNECTED:
            return True
        chain = chain.__cause__
    return False


def persistently(call: Callable[[], _T], tries: int = TRIES) -> _T:
    """What a call returns; after an error that passes it is called again, up to `tries` times in all, or `CONNECTING` without a connection."""
    for done in range(1, tries + 1):
        try:
            return call()
        except Exception as error:
            if done >= (min(tries, CONNECTING) if never_connected(error) else tries) or not passes(error):
                raise
            cause = error.__cause__ if isinstance(error, RevisionResolutionError) and error.__cause__ else error
            logger.warning("%s: %s. Trying again.", type(cause).__name__, cause)
        sleep(WAIT * 2 ** (done - 1))
    raise AssertionError("the last try returns or raises")
