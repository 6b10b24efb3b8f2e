"""Names under which a tensor of the table lies in files: those of the Hub repository, of the live model, of a base model, of older files."""

from __future__ import annotations

from ..architectures import Architecture
from ..architectures.axes import TensorRule

Names = tuple[str, ...]


def stored_names(
    rule: TensorRule, architecture: Architecture, expert: int | None = None, segment: str | None = None
) -> Names:
    """The names a tensor can have in a file: Hub layout, live layout, a base model's without the prefix of either, and those in larger models.

    Args:
        rule (`TensorRule`): The tensor.
        expert (`int`, *optional*): Which expert's, where they are stored one by one.
        segment (`str`, *optional*): Which of its segments, where they are stored one by one.
    """
    live = disk = rule.name
    if expert is not None or segment is not None:
        disk = rule.disk_name(expert, segment)
        live = _live_prefix(disk, architecture)
    elif not rule.apart:
        disk = rule.disk_name()
    names: Names = (
        disk,
        live,
        disk.removeprefix(architecture.disk_prefix),
        live.removeprefix(_base(architecture)),
    )
    base = _base(architecture)
    names += tuple(host.prefix + live.removeprefix(base) for host in architecture.hosts if live.startswith(base))
    for now, before in architecture.old_names.items():
        if any(name.endswith(f".{now}") for name in names):
            names += tuple(name.removesuffix(now) + before for name in names)
    return names


def apart_names(rule: TensorRule, architecture: Architecture, count: int) -> list[list[Names]]:
    """The names of what one live tensor is stored as, in each of the ways in which they can be named.

    Args:
        rule (`TensorRule`): One that is `apart`.
        count (`int`): Of experts, where they are stored one by one.

    Returns:
        `list[list[tuple[str, ...]]]`: Per way one entry per expert, or one; in it one name per segment.
    """
    experts = range(count) if rule.stacked else (None,)
    names = [[stored_names(rule, architecture, expert, segment) for segment in rule.segments] for expert in experts]
    ways = min(len(spelled) for segments in names for spelled in segments) if names else 0
    return [[tuple(spelled[way] for spelled in segments) for segments in names] for way in range(ways)]


def is_base(name: str, architecture: Architecture) -> bool:
    """Whether a tensor of the live causal model belongs to its base model."""
    return name.startswith(_base(architecture))


def _base(architecture: Architecture) -> str:
    """Prefix of the base model's tensors in the live causal model."""
    return architecture.layers_path.partition(".")[0] + "."


def _live_prefix(disk: str, architecture: Architecture) -> str:
    """A name of the Hub layout under the live model's prefix."""
    prefix = architecture.disk_prefix
    return _base(architecture) + disk.removeprefix(prefix) if disk.startswith(prefix) else disk
