"""What `baselines.py` needs to know of a task of the lab besides the task itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_elastic.lab.family import BETWEEN, ROUTER_CHOICES, ROUTER_TARGETS


@dataclass(frozen=True)
class Extras:
    """Sizes besides those of the family. A task that lacks some is not asked about them.

    Args:
        between (`dict[str, Any]`, *optional*): A size between two others, which the family's run never draws.
        router_targets (`dict[str, Any]`, *optional*): What a router's sizes may cost.
        router_choices (`dict[str, list[int]]`, *optional*): What it chooses among.
    """

    between: Mapping[str, Any] = field(default_factory=dict)
    router_targets: Mapping[str, Any] = field(default_factory=dict)
    router_choices: Mapping[str, Any] = field(default_factory=dict)


EXTRAS = {
    "book": Extras(BETWEEN, ROUTER_TARGETS, ROUTER_CHOICES),
    "stories": Extras({"hidden": 40, "ffn": 96, "layers": [0, 2, 3, 5]}),
}
