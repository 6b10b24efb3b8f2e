"""The name of a loaded model, which says which size it is.

Other libraries load a model again by its name: trl makes the reference of DPO, KTO, RLOO and GRPO from `config._name_or_path`. The name of
a slice is that of its family, and so would the reference be the family. Here the name is still a string, the folder or repository, and
reads, prints and is saved as one; `from_pretrained` of this package also takes from it what was loaded from there.
"""

from __future__ import annotations

from typing import Any

import yaml

from ..architectures.submodel import Submodel


class LoadedFrom(str):
    """Where a model was loaded from, and what of it.

    Args:
        place (`str`): Folder or repository.
        submodel (`Submodel`, *optional*): The size, of what is saved there; `None` for everything.
        described (*optional*): What `elastic_config=` said of a plain checkpoint.
        hub (`dict`, *optional*): `revision`, `cache_dir`, ... that it was loaded with.
        whole (`str`, *optional*): The name of what the model is a size of, if that is in memory, too.
    """

    submodel: Submodel | None
    described: Any
    hub: dict[str, Any]
    whole: str | None

    def __new__(
        cls,
        place: str,
        submodel: Submodel | None = None,
        described: Any = None,
        hub: dict[str, Any] | None = None,
        whole: str | None = None,
    ) -> LoadedFrom:
        name = super().__new__(cls, place)
        name.submodel, name.described, name.hub, name.whole = submodel, described, dict(hub or {}), whole
        return name

    @property
    def is_saved(self) -> bool:
        """Whether the size can be read from there; not if it was made in memory, of weights that were sorted or given there."""
        return self.whole is None or isinstance(self.whole, LoadedFrom)

    def __copy__(self) -> LoadedFrom:
        return self

    def __deepcopy__(self, memo: Any) -> LoadedFrom:
        return self  # configs are copied for every budget, and nothing changes a name


def name_at(name: str, submodel: Submodel, full: Submodel) -> str:
    """The name of a size of a live model, from its name at any size.

    Args:
        name (`str`): Of the model at the size that it has now.
        submodel (`Submodel`): The size.
        full (`Submodel`): Everything that is loaded.
    """
    whole = name if not isinstance(name, LoadedFrom) or name.whole is None else name.whole
    if submodel == full or not whole:
        return whole
    if not isinstance(whole, LoadedFrom):
        return LoadedFrom(whole, submodel, whole=whole)
    there = submodel if whole.submodel is None else submodel.of(whole.submodel)
    return LoadedFrom(whole, there, whole.described, whole.hub, whole)


def taken_from(name: str) -> str:
    """The name of a size that becomes a model of its own, from its name at that size in the whole model; empty if it is saved nowhere."""
    if not isinstance(name, LoadedFrom) or name.whole is None:
        return name
    return LoadedFrom(name, name.submodel, name.described, name.hub) if name.is_saved else ""


def _write(dumper: Any, name: LoadedFrom) -> Any:
    return dumper.represent_str(str(name))


# Model cards name the base model in YAML, which writes other classes than `str` as Python objects.
for _dumper in (
    yaml.Dumper,
    yaml.SafeDumper,
    *(d for d in (getattr(yaml, "CDumper", None), getattr(yaml, "CSafeDumper", None)) if d),
):
    yaml.add_representer(LoadedFrom, _write, Dumper=_dumper)
