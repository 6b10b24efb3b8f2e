"""`ElasticConfig`: the parent's config, the axes it can be cut along, and the budgets it nests."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from transformers import PreTrainedConfig

from .architectures import Architecture, as_stock, get_architecture
from .architectures.cost import Cost, CostModel
from .architectures.encodings import Encoding
from .architectures.hosts import Host
from .architectures.submodel import LAYERS, Submodel, first_layers
from .configuration.budgets import (
    FULL,
    Budget,
    Limit,
    format_count,
    is_limit,
    parse_limit,
    size_lines,
    unit_hint,
    warn_if_far,
)
from .configuration.hosting import HOST, find_host, host_fields, parted, stock_host
from .configuration.leaving_out import LEFT_OUT
from .configuration.parent import (
    explained,
    is_shown,
    parent_from_dict,
    plain_parent_error,
    refuse_adapter,
    refuse_huge,
    unshown,
)
from .configuration.quantized import QUANTIZATION, encodings_of, quantization_section, refuse_off_blocks, renumbered
from .configuration.remote_code import InstalledCode
from .configuration.section import (
    CUT_FROM,
    check_left_out,
    check_origin,
    check_ranking,
    checked_section,
    describe_axes,
)
from .errors import (
    CheckpointError,
    ElasticConfigError,
    UnknownBudgetError,
    did_you_mean,
    meant_budget,
    shown,
)
from .storage.exchanging import refuse_interrupted
from .storage.files import HUB_ARGUMENTS, find_file
from .storage.json_files import json_words, read_json
from .storage.sources import pinned, refuse_missing_folder


class ElasticConfig(InstalledCode, PreTrainedConfig):
    r"""
    Configuration of an elastic checkpoint. `config.json` holds the parent's own config under `parent_config` and everything this
    library adds under `elastic`, where unknown keys are errors.

    Args:
        parent_config (`PreTrainedConfig` or `dict`):
            The stock config of the weights. Its `model_type` has to be a supported architecture.
        elastic (`dict`):
            - `version` (`int`): format of this section.
            - `axes` (`dict`): per elastic axis its `choices` (sizes, largest first), its `policy` (how a smaller size is taken out:
              a prefix, or a prefix per group of a named config field), and for `layers` the `ranking` of all layers, most important first.
            - `budgets` (`dict`): per name its `sizes`, `total_params` and `active_params`. Budgets are nested: each one keeps a part of
              the next larger one. Counts may be left out when a config is made; they are always written and always checked.
            - `interpolated` (`list`, *optional*): submodels without a name that a router chose between two budgets; entries as in
              `budgets`, nested with them in one chain. They are what limits between the budgets resolve to.
            - `router` (`dict`, *optional*): what the router beside the weights is rebuilt from, see [`hf_elastic.routing.router.BudgetRouter`].
            - `handover` (`dict`, *optional*): `trained` (`bool`), whether submodels were trained to go on from each other's caches.
            - `quantization` (`dict`, *optional*): which weights are stored in few bits, see [`hf_elastic.configuration.quantized`].
        cut_from (`dict`, *optional*): In a slice, what it was cut from: `family` and `commit` if it was on the Hub, and the `budget`.
        left_out (`list[str]`, *optional*): Tensors of the parent that its stock class does not load, by layer: `["mtp.layers.0.*"]`.
        host_config (`dict`, *optional*): Of a parent that is part of a larger model, such as a vision-language model, the rest of that one's config.

    Raises:
        `ElasticConfigError`: says which axis or budget is wrong, what is allowed, and what to do.
        `UnsupportedArchitectureError`: no table for the parent's `model_type`.

    Example:

    ```python
    >>> from transformers import NemotronHConfig
    >>> from hf_elastic import ElasticConfig

    >>> parent = NemotronHConfig(hidden_size=64, layers_block_type=["mlp"], intermediate_size=128, vocab_size=100)
    >>> config = ElasticConfig.from_parent(parent, {"half": {"ffn": 64}})
    >>> config.budgets["half"]["total_params"]
    21120
    ```
    """

    model_type = "elastic"
    has_no_defaults_at_init = True

    parent_config: Any = None
    elastic: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        parent = self.parent_config
        if isinstance(parent, Mapping):
            parent = parent_from_dict(parent, written=self.transformers_version)
        if not isinstance(parent, PreTrainedConfig):
            raise ElasticConfigError(
                f"parent_config={shown(parent)} must be the stock config of the parent, or its dict."
            )
        self.parent_config = parent
        check_origin(kwargs.get(CUT_FROM))
        check_left_out(kwargs.get(LEFT_OUT))
        if (around := kwargs.get(HOST)) is not None:
            with explained(self.model_type):
                stock_host(find_host(parent, around), around, parent)
        code = kwargs.get("auto_map", {})
        if not isinstance(code, Mapping) or not all(isinstance(name, str) for name in code.values()):
            raise ElasticConfigError(f"auto_map={shown(code)} must be a dict from class to the name of one.")
        dtype = getattr(torch, self.dtype, None) if isinstance(self.dtype, str) else self.dtype
        if not isinstance(dtype, torch.dtype) and self.dtype is not None:
            raise ElasticConfigError(
                f"dtype={shown(self.dtype)} must be 'auto', a torch.dtype or its name, such as 'bfloat16'."
            )
        names = self.architectures
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ElasticConfigError(f"architectures={shown(names)} must be a list of names of classes.")
        super().__post_init__(**kwargs)
        self.elastic = checked_section(parent, self.elastic)
        if getattr(self, "dtype", None) is None:
            self.dtype: Any = parent.dtype
        # trl reads both without asking whether they are there.
        self.architectures: Any = getattr(self, "architectures", None) or ["ElasticForCausalLM"]
        self.auto_map: Any = getattr(self, "auto_map", None) or {}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As the stock method, with an error of this package for fields that do not make a config."""
        refuse_huge(config_dict)
        for name in kwargs:
            if name in _READ_ONLY:
                raise TypeError(f"unexpected argument {name!r}: the config says that itself.{meant_budget(name)}")
        with explained(cls.model_type), unshown():
            return super().from_dict(config_dict, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        fields = cls._decode_special_floats(read_json(json_file))
        if not isinstance(fields, dict):  # {"__float__": ...} is a number
            raise CheckpointError(f"{json_file} holds {json_words(fields)}, it must hold a JSON object.")
        return fields

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> Any:
        """As the stock method, with the checks of `from_dict`."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    @classmethod
    def from_parent(
        cls,
        parent_config: PreTrainedConfig,
        budgets: Mapping[str, Mapping[str, Any]],
        *,
        choices: Mapping[str, list[int]] | None = None,
        layer_ranking: list[int] | None = None,
    ) -> ElasticConfig:
        """Describe a parent whose weights are already sorted.

        Args:
            parent_config (`PreTrainedConfig`): Stock config.
            budgets (`dict[str, dict[str, Any]]`): Sizes per name, as `Architecture.submodel` takes them.
            choices (`dict[str, list[int]]`, *optional*): Further sizes per axis, besides those of the budgets and the parent.
            layer_ranking (`list[int]`, *optional*): All layers, most important first; needed if an entry of `budgets` gives `layers` as a number.
        """
        if not isinstance(parent_config, PreTrainedConfig):
            raise ElasticConfigError(f"parent_config={shown(parent_config)} must be the stock config of the parent.")
        if not isinstance(budgets, Mapping):
            raise ElasticConfigError(f"budgets={shown(budgets)} must be a dict from name to sizes.")
        architecture = get_architecture(parent_config.model_type)
        if layer_ranking is not None:
            check_ranking(layer_ranking, architecture.depth(parent_config), "layer_ranking")
        submodels = {}
        for name, sizes in budgets.items():
            if not isinstance(sizes, Mapping):
                raise ElasticConfigError(
                    f"budget {name!r}={shown(sizes)} must be a dict from axis to size; elastify() finds sizes for a target."
                )
            sizes, count = dict(sizes), sizes.get(LAYERS)
            if isinstance(count, int) and not isinstance(count, bool) and layer_ranking is not None:
                sizes[LAYERS] = first_layers(layer_ranking, count, f"budget {name!r}: layers={count}")
            submodels[name] = architecture.submodel(parent_config, sizes, f"budget {name!r}")
        axes = describe_axes(architecture, parent_config, list(submodels.values()), choices or {}, layer_ranking)
        entries = {name: {"sizes": submodel.to_dict()} for name, submodel in submodels.items()}
        return cls(parent_config=parent_config, elastic={"axes": axes, "budgets": entries})

    @classmethod
    def get_config_dict(cls, repo: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As upstream's, which takes a connection that failed for a repository without a config; here the file is fetched before."""
        if not os.path.exists(repo):
            hub = pinned(repo, {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None})
            if find_file(repo, "config.json", hub) is not None:
                kwargs |= {key: value for key, value in hub.items() if key in ("revision", "subfolder")}
        return super().get_config_dict(repo, **kwargs)

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def architecture(self) -> Architecture:
        """Table of the parent."""
        return get_architecture(self.parent_config.model_type)

    @property
    def host(self) -> Host | None:
        """The larger model that the parent is a part of, if the checkpoint keeps the rest of it."""
        fields = getattr(self, HOST, None)
        return None if fields is None else self.architecture.host(fields["model_type"])

    @property
    def axes(self) -> dict[str, dict[str, Any]]:
        """Elastic axes: choices and policies."""
        return self.elastic["axes"]

    @property
    def budgets(self) -> dict[str, dict[str, Any]]:
        """Named budgets, largest first: sizes and exact counts; they print as a table. The whole parent (`"full"`) is always there as well."""
        return self.elastic["budgets"]

    @property
    def interpolated(self) -> list[dict[str, Any]]:
        """Submodels without a name that limits between two budgets resolve to, largest first: sizes and exact counts."""
        return self.elastic.get("interpolated", [])

    @property
    def load_dtype(self) -> torch.dtype:
        """The type that weights are loaded in if nothing else is asked for, as far as the config says it."""
        return self.dtype if isinstance(self.dtype, torch.dtype) else torch.get_default_dtype()

    @property
    def handover_trained(self) -> bool:
        """Whether submodels were trained to go on from each other's caches (`handover_probability` of the trainer)."""
        return bool(self.elastic.get("handover", {}).get("trained", False))

    @handover_trained.setter
    def handover_trained(self, trained: bool) -> None:
        section = {key: value for key, value in self.elastic.items() if key not in ("handover", "version")}
        if trained:
            section["handover"] = {"trained": True}
        self.elastic = checked_section(self.parent_config, section)

    @property
    def encodings(self) -> dict[str, Encoding]:
        """What weights are stored in that are stored in few bits, by their names in the live parent."""
        section = self.elastic.get(QUANTIZATION)
        return {} if section is None else encodings_of(self.architecture, self.parent_config, section)

    def quantized(self, encodings: Mapping[str, Encoding] | None, recipe: Any = None) -> ElasticConfig:
        """The same config of a checkpoint in which these weights are stored in these encodings; `None`: in which none is.

        Raises:
            `ElasticConfigError`: a size is cut off the blocks of one.
        """
        made, parent = copy.copy(self), self.parent_config
        section = {key: value for key, value in self.elastic.items() if key not in (QUANTIZATION, "version")}
        if encodings:
            section[QUANTIZATION] = quantization_section(self.architecture, parent, encodings, recipe)
        made.elastic = checked_section(parent, section)
        return made

    def submodel(self, name: str) -> Submodel:
        """The submodel of a named budget, or of `"full"`.

        Raises:
            `UnknownBudgetError`: no budget has that name.
        """
        if name == FULL and FULL not in self.budgets:
            return self.architecture.full(self.parent_config)
        if name not in self.budgets:
            raise UnknownBudgetError(
                f"no budget is called {name!r}; this checkpoint has {self._listing()}.{did_you_mean(name, self.family())}"
            )
        return self.architecture.submodel(self.parent_config, self.budgets[name]["sizes"], f"budget {name!r}")

    def family(self) -> dict[str, Submodel]:
        """All submodels by name, the whole parent first. A named budget that is the whole parent stands for it."""
        named = {name: self.submodel(name) for name in self.budgets}
        full = self.architecture.full(self.parent_config)
        return named if full in named.values() else {FULL: full, **named}

    def between(self) -> list[Submodel]:
        """The submodels of `interpolated`."""
        made = self.architecture.submodel
        return [made(self.parent_config, entry["sizes"], "an interpolated submodel") for entry in self.interpolated]

    def chain(self) -> list[tuple[str | None, Submodel]]:
        """All submodels that a limit selects among, each nested in the one before it; the interpolated ones have no name."""
        count = self.cost_model()
        members = [*self.family().items(), *((None, submodel) for submodel in self.between())]
        return sorted(members, key=lambda member: (-(cost := count(member[1])).total_params, -cost.active_params))

    def resolve(
        self, budget: Budget | Submodel, dtype: torch.dtype | None = None, *, packed: bool = False
    ) -> Submodel:
        """The submodel that a budget asks for.

        Args:
            budget: See [`hf_elastic.configuration.budgets`].
            dtype (`torch.dtype`, *optional*): Load dtype for budgets given in bytes, defaults to the checkpoint's.
            packed (`bool`, *optional*, defaults to `False`):
                For budgets given in bytes, whether weights that are stored in few bits stay so in memory; otherwise they are decoded. The config of a
                live model only speaks of weights that did stay so.

        Raises:
            `UnknownBudgetError`: no such name, or no member of the family is small enough.
            `ElasticConfigError`: sizes that are not allowed, or that are cut off the blocks of weights that are stored in few bits.
        """
        if isinstance(budget, Submodel):
            if not budget.nests_in(self.architecture.full(self.parent_config)):
                raise ElasticConfigError(
                    f"{budget.to_dict()} is a submodel of another parent, or larger than this one."
                )
            self.architecture.check(self.parent_config, budget)
            return self._on_blocks(budget, "this size")
        if budget is None:
            return self.architecture.full(self.parent_config)
        if isinstance(budget, Mapping) and not is_limit(budget):
            submodel = self.architecture.submodel(self.parent_config, budget, "budget")
            return self._on_blocks(submodel, f"budget {shown(dict(budget))}")
        if isinstance(budget, bool) or not isinstance(budget, (str, Real, Mapping)):
            raise ElasticConfigError(
                f"budget={shown(budget)} must be a name, a number of parameters, an amount of memory or a dict of sizes."
            )
        if isinstance(budget, str):
            for name in [*self.budgets, FULL]:
                if name.lower() == budget.strip().lower():
                    return self.submodel(name)
        count = self.cost_model()
        limit = parse_limit(budget, count.full)
        if limit is None:
            known = self.family()
            raise UnknownBudgetError(
                f"unknown budget {shown(budget)}; this checkpoint has {self._listing()}.{did_you_mean(str(budget), known)} A number "
                "of parameters ('1.5B', '300M active'), a share of the parent ('50%') or a number of bytes ('24GB') selects the largest one that fits."
            )
        return self._largest(budget, limit, dtype or self.load_dtype, count, packed)

    def _on_blocks(self, submodel: Submodel, called: str) -> Submodel:
        """A submodel that no budget names, if it is cut at whole blocks of the weights that are stored in few bits."""
        if encodings := self.encodings:
            refuse_off_blocks(self.architecture, self.parent_config, encodings, {called: submodel})
        return submodel

    def cost_model(self) -> CostModel:
        """Counts submodels as they are stored here."""
        return CostModel(self.parent_config, encodings=self.encodings)

    def costs(self) -> dict[str, Cost]:
        """Exact cost of every member of the family, in the order of `family`."""
        count = self.cost_model()
        return {name: count(submodel) for name, submodel in self.family().items()}

    def name_of(self, submodel: Submodel) -> str | None:
        """The name of a submodel, if it has one."""
        return next((name for name, member in self.family().items() if member == submodel), None)

    # -- deriving ------------------------------------------------------------------------------------------------------

    def stock_config(self, submodel: Submodel) -> PreTrainedConfig:
        """The stock config of a submodel; `per_layer_config` says where layers differ."""
        return self.architecture.config_for(self.parent_config, submodel)

    def restrict(self, submodel: Submodel) -> ElasticConfig:
        """The config of a slice: the submodel is the new parent, and the budgets and interpolated submodels that nest in it stay.

        The router stays only with the whole parent, whose sizes it chooses among.
        """
        named = {name: self.submodel(name) for name in self.budgets}
        budgets = {name: member for name, member in named.items() if member.nests_in(submodel)}
        between = [member for member in self.between() if member.nests_in(submodel) and member != submodel]
        stock = self.stock_config(submodel)
        kept = set(submodel.layers)
        axes = copy.deepcopy(self.axes)
        for name, axis in axes.items():
            if name == LAYERS:
                axis["ranking"] = [submodel.layers.index(i) for i in axis["ranking"] if i in kept]
                largest = len(submodel.layers)
            else:
                largest = max(submodel.values(name), default=0)
            axis["choices"] = sorted({c for c in axis["choices"] if c < largest} | ({largest} - {0}), reverse=True)
        axes = {name: axis for name, axis in axes.items() if axis["choices"]}
        entries = {name: {"sizes": member.within(submodel.layers).to_dict()} for name, member in budgets.items()}
        section: dict[str, Any] = {"axes": axes, "budgets": entries}
        if between:
            section["interpolated"] = [{"sizes": member.within(submodel.layers).to_dict()} for member in between]
        if "router" in self.elastic and submodel == self.architecture.full(self.parent_config):
            section["router"] = self.elastic["router"]
        if "handover" in self.elastic:
            section["handover"] = self.elastic["handover"]
        if encodings := self.encodings:
            parent, architecture = self.parent_config, self.architecture
            refuse_off_blocks(architecture, parent, encodings, {"this size": submodel})
            coded = renumbered(architecture, parent, encodings, submodel)
            recipe = self.elastic[QUANTIZATION].get("recipe")
            if coded:
                section[QUANTIZATION] = quantization_section(architecture, stock, coded, recipe)
        made = type(self)(parent_config=stock, elastic=section)
        if hasattr(self, LEFT_OUT):
            setattr(made, LEFT_OUT, getattr(self, LEFT_OUT))
        if self.host is not None:
            made.host_config = self.host.fields_at(self.host_config, submodel.at(None))
        return made

    def to_dict(self) -> dict[str, Any]:
        """JSON form. The parent's section is what its own `config.json` holds."""
        output = super().to_dict()
        parent = self.parent_config.to_diff_dict()
        parent.pop("transformers_version", None)
        output["parent_config"] = {**parent, "model_type": self.parent_config.model_type}
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        full = self.to_dict()
        diff = super().to_diff_dict()
        return {**diff, "parent_config": full["parent_config"], "elastic": full["elastic"]}

    def sizes_shown(self, active: str | None = None) -> str:
        """The sizes as lines of text: name, parameters, active parameters.

        Args:
            active (`str`, *optional*): Name of the size to be marked as the one that runs.
        """
        return size_lines(
            [(name, cost.total_params, cost.active_params) for name, cost in self.costs().items()], active
        )

    def __repr__(self) -> str:
        if not is_shown():
            return type(self).__name__
        return f"{type(self).__name__} of {self.parent_config.model_type} with the sizes\n{self.sizes_shown()}\n{super().__repr__()}"

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _listing(self) -> str:
        return ", ".join(f"{name!r} ({format_count(cost.total_params)})" for name, cost in self.costs().items())

    def _largest(
        self, budget: Any, limit: Limit, dtype: torch.dtype, count: CostModel, packed: bool = False
    ) -> Submodel:
        members = self.chain()
        measured = [limit.measure(count(submodel), dtype, packed) for _, submodel in members]
        fitting = [i for i, value in enumerate(measured) if value <= limit.value]
        if not fitting:
            smallest = measured.index(min(measured))
            raise UnknownBudgetError(
                f"no submodel fits into {limit}: the smallest, {members[smallest][0]!r}, needs {limit.of(measured[smallest])}.{unit_hint(limit)}"
            )
        found = max(fitting, key=lambda i: measured[i])
        above = [i for i, value in enumerate(measured) if value > limit.value]
        larger = min(above, key=lambda i: measured[i], default=None)
        if larger is None:
            advice = f"Sizes of this checkpoint: {self._listing()}."
        else:
            name = members[larger][0]
            advice = f"The next larger is {'one without a name' if name is None else repr(name)}, {limit.of(measured[larger])}."
        warn_if_far(
            f"budget {shown(budget)}", limit, measured[found], limit.measure(count.full, dtype, packed), advice
        )
        return members[found][1]


_READ_ONLY = {
    name
    for name, value in vars(ElasticConfig).items()
    if isinstance(value, FunctionType) or (isinstance(value, property) and value.fset is None)
}
"""What `from_dict` must not take for fields: upstream's would fail at a property without a word of help, and write over a method."""


def read_config(repo: Any, plain: bool = False, **hub: Any) -> ElasticConfig:
    """The elastic config of a folder or Hub repository.

    Args:
        repo (`str` or `os.PathLike`): Where `config.json` is.
        plain (`bool`, *optional*, defaults to `False`): Take a plain checkpoint of a supported architecture as a family without budgets.
        hub: `cache_dir`, `revision`, `token`, ... as `PreTrainedConfig.from_pretrained` takes them.

    Raises:
        `ElasticConfigError`: a plain checkpoint, and `plain` is not set.
    """
    fields = read_fields(repo, **hub)
    model_type = fields["model_type"]
    if model_type == ElasticConfig.model_type:
        return ElasticConfig.from_dict(fields)  # type: ignore[no-any-return]
    if plain or parted(fields)[0].get(
        "per_layer_config"
    ):  # the latter is a heterogeneous export, which only this package loads
        return _around(ElasticConfig.from_parent(parent_from_dict(fields), {}), fields)
    raise plain_parent_error(repo, model_type)


def _around(elastic: ElasticConfig, fields: Mapping[str, Any]) -> ElasticConfig:
    """A family with what the larger model of its `config.json` says, if there is one."""
    with explained(elastic.parent_config.model_type):
        around = host_fields(fields, elastic.parent_config)
    if around is not None:
        find_host(elastic.parent_config, around)
        elastic.host_config = around
    return elastic


def read_fields(repo: Any, **hub: Any) -> dict[str, Any]:
    """What `config.json` of a folder or Hub repository holds, whatever model it is of, in the form that stock classes read.

    Raises:
        `CheckpointError`: there is none, it is damaged, or a save into the folder was interrupted.
    """
    refuse_missing_folder(repo)
    refuse_interrupted(repo, hub.get("subfolder"))
    refuse_adapter(Path(repo, hub.get("subfolder") or ""))
    if os.path.isdir(repo) and not Path(repo, hub.get("subfolder") or "", "config.json").is_file():
        raise CheckpointError(f"{repo} has no config.json.")
    fields, _ = ElasticConfig.get_config_dict(repo, **hub)
    if not isinstance(fields.get("model_type"), str):
        raise CheckpointError(f"{repo} has no config.json with a model_type.")
    return as_stock(fields)
