"""Passengers of a family: tensors of the larger model that its parent is a part of, such as a vision tower, kept for every size and run by none.

A save writes them into `passengers.safetensors`, which is read when they are needed: for the next save, and for an export of the larger
model at a size. What the parent reads from them or writes to them is sorted and cut with it ([`hf_elastic.architectures.hosts.Host`]).
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.initialization import no_init_weights

from ..architectures import get_architecture
from ..architectures.axes import Sizes
from ..architectures.hosts import Host
from ..architectures.submodel import LAYERS
from ..configuration.hosting import find_host, host_fields, parted, stock_host
from ..configuration.parent import parent_from_dict
from ..configuration_elastic import ElasticConfig, read_config
from ..errors import CheckpointError
from ..storage.checksums import verify_files
from ..storage.files import INDEX_NAME, SINGLE_NAME, find_file, find_files
from ..storage.sources import pinned
from ..storage.streaming import write_tensors
from ..submodels.buffers import share_constant_buffers
from ..submodels.slicing import build_meta
from .checkpoint import Checkpoint
from .encoding import Computed

PASSENGERS = "passengers.safetensors"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""What reads images and the like for a model that takes them."""

Tensors = Mapping[str, Any]
"""By name what gives a tensor when it is indexed: a tensor, or a part of a file that is not read yet."""


class Passengers:
    """The passengers of one family.

    Args:
        host (`Host`): The larger model.
        sizes (`dict[str, int]`): Sizes of the parent's global axes, as the stored tensors have them.
        find (`Callable`): Finds the tensors, when they are first needed; they are all there, and of the right shapes.
        orders (`dict[str, torch.Tensor]`, *optional*): By which the parent was sorted since they were stored.
    """

    def __init__(
        self,
        host: Host,
        sizes: Sizes,
        find: Callable[[], Tensors],
        orders: Mapping[str, torch.Tensor] | None = None,
    ):
        self.host, self._sizes, self._find, self._orders = host, dict(sizes), find, dict(orders or {})
        self._found: Tensors | None = None

    @property
    def tensors(self) -> Tensors:
        """As they are stored.

        Raises:
            `CheckpointError`: they are not where they were, or not whole.
        """
        if self._found is None:
            self._found = self._find()
        return self._found

    def at(self, sizes: Sizes, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """All of them for a size, read and cut.

        Args:
            sizes (`dict[str, int]`): Of the parent's global axes.
        """
        return {name: self._at(name, sizes, dtype) for name in self.tensors}

    def _at(self, name: str, sizes: Sizes, dtype: torch.dtype) -> torch.Tensor:
        stored = self.tensors[name]
        rule = self.host.rule(name, tuple(stored.shape))
        ordered = rule.permute(stored[...], self._sizes, self._orders)
        return rule.narrow(ordered, self._sizes, sizes).to(dtype).contiguous()

    def save(self, folder: Path, sizes: Sizes, dtype: torch.dtype, beside: Mapping[str, Path]) -> None:
        """Write them for a size, one after the other, into a file of their own, and the files that go with them, as [`processor_files`] finds them."""
        content = {}
        for name, stored in self.tensors.items():
            shape = self.host.rule(name, tuple(stored.shape)).shape(sizes)
            content[name] = Computed(shape, dtype, partial(self._at, name, sizes, dtype), ())
        write_tensors(folder / PASSENGERS, content)
        for name, path in beside.items():
            shutil.copyfile(path, folder / name)

    def sorted_by(self, orders: Mapping[str, torch.Tensor]) -> Passengers:
        """Those of the parent with its axes sorted."""
        return Passengers(self.host, self._sizes, lambda: self.tensors, orders)

    def __deepcopy__(self, memo: Any) -> Passengers:
        return self  # nothing changes them

    def __reduce__(self) -> Any:
        whole = {name: stored[...].clone() for name, stored in self.tensors.items()}
        return _unpickled, (self.host, self._sizes, whole, self._orders)


def _unpickled(host: Host, sizes: Sizes, tensors: Tensors, orders: Mapping[str, torch.Tensor]) -> Passengers:
    return Passengers(host, sizes, lambda: tensors, orders)


def open_passengers(
    repo: str | os.PathLike[str], elastic: ElasticConfig, hub: Mapping[str, Any], verify: bool = False
) -> Passengers | None:
    """The passengers of a checkpoint, `None` if its config says of none. Files of a folder are opened, those of the Hub fetched when they are needed.

    Args:
        elastic (`ElasticConfig`): Of everything that is stored there.
        verify (`bool`, *optional*, defaults to `False`): As `open_checkpoint` takes it.
    """
    if elastic.host is None:
        return None
    host, fields, parent = elastic.host, elastic.host_config, elastic.parent_config
    hub = {key: value for key, value in hub.items() if key != "force_download"}  # that was for what is loaded now

    def find() -> Tensors:
        own = find_file(repo, PASSENGERS, hub, verify=verify)
        if verify and own is not None and os.path.isdir(repo):
            verify_files(Path(repo, hub.get("subfolder") or ""), [own])
        checkpoint = Checkpoint(find_files(repo, **hub) if own is None else [own])
        return checked(host, fields, parent, checkpoint.whole(filter(host.carries, checkpoint)), repo)

    made = Passengers(host, elastic.architecture.full(parent).at(None), find)
    if os.path.isdir(repo):
        made.tensors  # noqa: B018 - opened now: the folder may be gone when they are needed
    return made


def parent_inside(whole: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, Any], Passengers] | None:
    """The parent in a larger model, on the same tensors, with what else there is; `None` for a model that no table knows as one around a parent."""
    fields = json.loads(whole.config.to_json_string())
    if parted(fields)[1] is None:
        return None
    config = parent_from_dict(fields)
    architecture, around = get_architecture(config.model_type), host_fields(fields, config)
    assert around is not None  # as `parted` says
    host, section = find_host(config, around), whole.config.get_text_config()
    config._name_or_path = whole.name_or_path
    config._attn_implementation = section._attn_implementation
    config._experts_implementation = section._experts_implementation
    parent = build_meta(architecture, config, architecture.causal_class)
    share_constant_buffers(parent, whole)
    state, base = whole.state_dict(), f"{parent.base_model_prefix}."
    mine = {
        base + name.removeprefix(host.prefix) if name.startswith(host.prefix) else name: tensor
        for name, tensor in state.items()
        if not host.carries(name)
    }
    parent.load_state_dict(mine, assign=True)
    parent.tie_weights()
    parent.train(whole.training)
    parent.name_or_path, parent.generation_config = whole.name_or_path, copy.deepcopy(whole.generation_config)
    others = {name: tensor.detach().clone() for name, tensor in state.items() if host.carries(name)}
    checked(host, around, config, others, f"this {host.model_type}")
    return parent, around, Passengers(host, architecture.full(config).at(None), lambda: others)


def passengers_beside(model: PreTrainedModel) -> tuple[dict[str, Any], Passengers] | None:
    """The passengers in the files that a stock parent was loaded from, if they are on this machine, and the rest of the config that they go with."""
    architecture, repo, local = (
        get_architecture(model.config.model_type),
        model.name_or_path,
        {"local_files_only": True},
    )
    if not architecture.hosts or not repo:
        return None
    try:
        elastic = read_config(repo, plain=True, **local)
    except (OSError, ValueError):  # it was not loaded from there
        return None
    if elastic.host is None or elastic.architecture is not architecture:
        return None
    full = [architecture.full(config).at(None) for config in (elastic.parent_config, model.config)]
    if full[0] != full[1]:  # another model by that name
        return None
    passengers = open_passengers(repo, elastic, local)
    return None if passengers is None or not passengers.tensors else (elastic.host_config, passengers)


def processor_files(source: str, hub: Mapping[str, Any]) -> dict[str, Path]:
    """Those of the files beside a checkpoint that go with its passengers: what reads the other inputs of the larger model."""
    try:
        found = {name: find_file(source, name, pinned(source, hub)) for name in PROCESSOR_FILES} if source else {}
    except (OSError, CheckpointError):
        if os.path.isdir(source) or "revision" in hub:
            raise
        return {}  # a model made in memory can be named anything
    return {name: path for name, path in found.items() if path is not None}


def checked(host: Host, fields: Mapping[str, Any], parent: PreTrainedConfig, tensors: Tensors, where: Any) -> Tensors:
    """Tensors that are all passengers of a larger model, and of the shapes that its stock class has.

    Raises:
        `CheckpointError`: names the first that are missing, unknown or of another shape.
    """
    architecture = get_architecture(parent.model_type)
    one = architecture.keepable_ranking(parent, range(architecture.depth(parent)))[:1]
    shallow = architecture.config_for(parent, architecture.submodel(parent, {LAYERS: one}))  # the rest is the same
    with torch.device("meta"), no_init_weights():
        stock = host.whole_class(stock_host(host, fields, shallow))
    expected = {name: tensor.shape for name, tensor in stock.state_dict().items() if host.carries(name)}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"{name} is unknown" for name in sorted(tensors.keys() - expected.keys())]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, the config says {tuple(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != tuple(shape)
    ]
    if problems:
        raise CheckpointError(
            f"{where} keeps what is beside the parent in a {host.model_type} ({', '.join(host.passengers)}), and that does not fit its config: "
            f"{'; '.join(problems[:5])}{' ...' if len(problems) > 5 else ''}. Fetch or save it again; export(..., text_only=True) does without."
        )
    return tensors


@contextmanager
def within(model: Any, host: Host | None) -> Iterator[None]:
    """Have the stock class save a parent's tensors under the names that they have in a larger model."""
    if host is None:
        yield
        return
    base = f"{model.base_model_prefix}."
    inner = host.prefix.removeprefix(base).removesuffix(".")
    own = [c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)]
    model._weight_conversions = [PrefixChange(prefix_to_remove=inner, model_prefix=base.rstrip(".")), *own]
    try:
        yield
    finally:
        del model._weight_conversions


def add_shard(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Add tensors to the checkpoint of a stock class, as its last file."""
    index = folder / INDEX_NAME
    if index.exists():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    else:
        weight_map = dict.fromkeys(Checkpoint([folder / SINGLE_NAME]), SINGLE_NAME)
    before = sorted(set(weight_map.values()))
    names = [f"model-{i:05}-of-{len(before) + 1:05}.safetensors" for i in range(1, len(before) + 2)]
    renamed = dict(zip(before, names, strict=False))
    for old, new in renamed.items():
        (folder / old).rename(folder / new)
    save_file(tensors, folder / names[-1], metadata={"format": "pt"})
    weight_map = {name: renamed[file] for name, file in weight_map.items()} | dict.fromkeys(tensors, names[-1])
    metadata = {"total_size": Checkpoint([folder / name for name in names]).nbytes}
    text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    index.write_text(text, encoding="utf-8")


def not_passengers(host: Host | None, names: Iterable[str]) -> list[str]:
    """Those of some names that are of no passenger."""
    return [name for name in names if host is None or not host.carries(name)]
