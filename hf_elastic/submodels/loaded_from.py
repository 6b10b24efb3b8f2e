"""The name of a loaded model, which says which size it is.

Other libraries load a model again by its name: trl makes the reference of DPO, KTO, RLOO and GRPO from `config._name_or_path`. The name of
a slice is that of its family, and so would the reference be the family. Here the name is still a string, the folder or repository, and
reads, prints and is saved as one; `from_pretrained` of this package, of the stock classes that it knows and of `AutoConfig` also take from it what
was loaded from there.
"""

from __future__ import annotations

import os
from typing import Any

import yaml

from ..architectures.submodel import Submodel
from ..errors import ElasticConfigError

WHERE = ("cache_dir", "local_files_only", "revision", "subfolder")
"""Arguments that say, beside the name, where a model was loaded from."""


class LoadedFrom(str):
    """Where a model was loaded from, and what of it.

    Args:
        place (`str`): Folder or repository.
        submodel (`Submodel`, *optional*): The size, of what is saved there; `None` for everything.
        described (*optional*): What `elastic_config=` said of a plain checkpoint.
        hub (`dict`, *optional*): `revision`, `cache_dir`, ... that it was loaded with.
        whole (`str`, *optional*): The name of what the model is a size of, if that is in memory, too.
        is_saved (`bool`, *optional*, defaults to `True`):
            Whether the size can be read from there; not if it was made in memory, of weights that were sorted or given there.
        stock (`bool`, *optional*, defaults to `False`): Whether a stock class loaded it, in which case it is a plain checkpoint.
    """

    submodel: Submodel | None
    described: Any
    hub: dict[str, Any]
    whole: str | None
    is_saved: bool
    stock: bool

    def __new__(
        cls,
        place: str,
        submodel: Submodel | None = None,
        described: Any = None,
        hub: dict[str, Any] | None = None,
        whole: str | None = None,
        *,
        is_saved: bool = True,
        stock: bool = False,
    ) -> LoadedFrom:
        name = super().__new__(cls, place)
        name.submodel, name.described, name.hub, name.whole = submodel, described, dict(hub or {}), whole
        name.is_saved, name.stock = is_saved, stock
        return name

    def add_hub(self, kwargs: dict[str, Any]) -> bool:
        """Add to the arguments of a loader where it was loaded from. What is given goes first; says whether no revision is."""
        asked = kwargs.get("revision")
        again = getattr(asked, "initial", asked) is None  # the AutoClasses have found out what the default is now
        given = {key for key, value in kwargs.items() if value is not None} - ({"revision"} if again else set())
        kwargs.update({key: value for key, value in self.hub.items() if key not in given})
        return again

    def refuse_unsaved(self) -> None:
        """Raise [`ElasticConfigError`] for a size that was never saved there."""
        if not self.is_saved:
            where = f"{self} is not where it was saved" if self else "it was not loaded from anywhere"
            raise ElasticConfigError(
                f"this is a size of a family that was made in memory, and {where}, so it cannot be loaded again from its name (trainers do, for a "
                "reference model). Save the family, load it from there, and use that; or give the trainer a reference of your own: ref_model=."
            )

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
    if submodel == full:
        return whole
    if not isinstance(whole, LoadedFrom):
        return LoadedFrom(whole, submodel, whole=whole, is_saved=False)
    there = submodel if whole.submodel is None else submodel.of(whole.submodel)
    return LoadedFrom(whole, there, whole.described, whole.hub, whole, is_saved=whole.is_saved)


def taken_from(name: str) -> str:
    """The name of a size that becomes a model of its own, from its name at that size in the whole model."""
    if not isinstance(name, LoadedFrom) or name.whole is None:
        return name
    return LoadedFrom(name, name.submodel, name.described, name.hub, is_saved=name.is_saved)


def name_stock(model: Any, repo: str, kwargs: dict[str, Any]) -> None:
    """Let the name of a stock model say which `subfolder=` it was loaded from, which upstream leaves out: with a size of a family, that is all of it."""
    subfolder = kwargs["subfolder"]
    if os.path.isdir(repo):  # a plain name, as peft writes it into adapters
        name = os.path.join(repo, subfolder)
    else:
        name = LoadedFrom(repo, hub={key: kwargs[key] for key in WHERE if kwargs.get(key) is not None}, stock=True)
    model.name_or_path = model.config._name_or_path = name


def _write(dumper: Any, name: LoadedFrom) -> Any:
    return dumper.represent_str(str(name))


# Model cards name the base model in YAML, which writes other classes than `str` as Python objects.
for _dumper in (
    yaml.Dumper,
    yaml.SafeDumper,
    *(d for d in (getattr(yaml, "CDumper", None), getattr(yaml, "CSafeDumper", None)) if d),
):
    yaml.add_representer(LoadedFrom, _write, Dumper=_dumper)
