"""Processes that have seen nothing of a test: forked from one that has only imported what trainers need, which takes seconds each time."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["trl.trainer.sft_trainer", "peft", "datasets", "hf_elastic", "hf_elastic.trainers.elastic_distillation_trainer"]
)


def process(action: Callable[..., None], *args: Any) -> BaseProcess:
    """To be started; runs a function of a module."""
    return _CONTEXT.Process(target=action, args=args, daemon=True)
