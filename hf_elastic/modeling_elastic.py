"""`ElasticModel` and `ElasticForCausalLM`: stock models that know the submodels inside them.

For every architecture there is a class made of the elastic one and the stock one (`ElasticNemotronHForCausalLM`). The elastic
class adds loading, switching, saving and export; everything else (forward, generation, masks, caches, kernels, expert backends,
key conversions) is inherited from the stock class. `model.config` is the stock config of what runs, `model.elastic_config` says
what else is nested in it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import warnings
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.generation import GenerationMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .architectures import ARCHITECTURES, Architecture, get_architecture, uniform
from .architectures.submodel import Submodel
from .checkpoints.conversions import conversions
from .checkpoints.export import ExportMixin
from .checkpoints.loading import (
    as_loaded,
    built_from,
    checked_kwargs,
    configured,
    generation_config,
    load_config,
    load_dtype,
    refuse_incomplete,
    unknown_argument,
)
from .checkpoints.memory import resolve_for_loading
from .checkpoints.opening import open_checkpoint
from .checkpoints.origin import cut_from, loaded_from
from .checkpoints.packing import read_codes, refuse_unpackable, without_weights
from .checkpoints.passengers import not_passengers, open_passengers
from .checkpoints.released import with_encodings
from .checkpoints.saving import SavingMixin
from .configuration.budgets import Budget
from .configuration.hosting import HOST
from .configuration.leaving_out import LEFT_OUT, note_left_out
from .configuration.parent import plain_parent_error
from .configuration.remote_code import InstalledCode, add_to_transformers
from .configuration.section import CUT_FROM
from .configuration_elastic import ElasticConfig
from .errors import ElasticConfigError, shown
from .generation.phases import PhasedGenerationMixin
from .generation.speculation import SpeculationMixin
from .hub.pushing import PushMixin
from .routing.router import BudgetRouter, read_router
from .storage.files import refuse_out_of_reach
from .storage.sources import pinned
from .submodels.adapters import AdaptableMixin
from .submodels.buffers import set_buffers
from .submodels.loaded_from import WHERE, LoadedFrom, name_stock
from .submodels.packed import pack
from .submodels.slicing import use_eager_experts_if_misaligned
from .submodels.switching import SwitchingMixin

_HUB_KWARGS = (*WHERE, "force_download", "proxies", "token")


class ElasticPreTrainedModel(
    InstalledCode, AdaptableMixin, SwitchingMixin, SavingMixin, PushMixin, ExportMixin, PreTrainedModel
):
    """What both elastic classes share. Use [`ElasticForCausalLM`], [`ElasticModel`] or the AutoClasses."""

    config_class = ElasticConfig
    _stock_class: ClassVar[type[PreTrainedModel] | None] = None

    def __new__(cls, config: PreTrainedConfig | None = None, *args: Any, **kwargs: Any) -> ElasticPreTrainedModel:
        if cls._stock_class is None and config is not None:  # unpickling and copying give no config
            cls = concrete_class(cls, _parent_of(config))
        return super().__new__(cls)

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        stock = _parent_of(config)
        if kwargs:  # what from_pretrained knows was taken out on the way, so this is what nobody knows
            signature = inspect.signature(type(self).from_pretrained).parameters
            raise unknown_argument(next(iter(kwargs)), stock, signature)
        with built_from(stock):
            with uniform(stock):
                super().__init__(stock, *args)
            if stock.is_heterogeneous:
                self._rebuild_layers()
        self._adopt(config if isinstance(config, ElasticConfig) else ElasticConfig.from_parent(stock, {}))

    def _adopt(self, config: ElasticConfig, router: BudgetRouter | None = None) -> None:
        """Take over what an elastic config says; the stock config in it is the live one from now on.

        A router that the config describes is only there if its weights are.
        """
        elastic = copy.copy(config)
        elastic.parent_config, elastic.dtype = self.config, self.config.dtype
        self._init_switching(elastic)
        self.attach_router(router)

    def _rebuild_layers(self) -> None:
        """Replace the layers whose sizes differ; everything else in them keeps reading the model's own config at run time."""
        architecture = get_architecture(self.config.model_type)
        layers = architecture.layers_of(self)
        for i in self.config._heterogeneity_spec.per_layer_overrides:
            layer_config = self.config.per_layer_config[i]
            layers[i] = architecture.build_layer(layer_config, i)
            for module in layers[i].modules():
                if getattr(module, "config", None) is layer_config:
                    module.config = self.config
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Stock initialisation reads sizes from the global config; a layer of another size has to read its own.
        layer = getattr(module, "layer_idx", None)
        if layer is None or not self.config.is_heterogeneous:
            return super()._init_weights(module)
        whole, self.config = self.config, self.config.per_layer_config[layer]
        try:
            return super()._init_weights(module)
        finally:
            self.config = whole

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # Upstream looks for a decorator in the source of the class's module, which is the stock class's, not this one.
        return cls._stock_class is not None and cls._stock_class._can_set_experts_implementation()

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
        """A randomly initialised parent; what `AutoModelForCausalLM.from_config` calls."""
        stock = _parent_of(config)
        concrete = concrete_class(cls, stock)
        model = PreTrainedModel._from_config.__func__(concrete, stock, **kwargs)
        if isinstance(config, ElasticConfig):
            model._adopt(config)
        return model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        config: PreTrainedConfig | str | os.PathLike[str] | None = None,
        budget: Budget | Submodel = None,
        elastic_config: Any = None,
        verify: bool = False,
        packed: bool = False,
        **kwargs: Any,
    ) -> Any:
        r"""
        Load an elastic checkpoint, or one size of it. Only the rows and columns that the size keeps are read.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder or Hub repository of an elastic checkpoint.
            config (`ElasticConfig`, *optional*): Use it instead of the checkpoint's `config.json`.
            budget (*optional*):
                Which size: a name, a number of parameters (`1.2e9`, `"1.2B"`), active parameters (`"300M active"`), a share of the parent's (`0.5`,
                `"50%"`, `"50% active"`), weight memory (`"24GB"`), what is free (`"auto"`, see [`hf_elastic.checkpoints.memory`]), or a dict of sizes;
                see [`hf_elastic.configuration.budgets`]. `None` is the whole parent with all budgets switchable.
            elastic_config (*optional*):
                For a plain checkpoint whose weights are sorted already, what it nests: `"auto"` for a released family, or an
                [`ElasticConfig`], its section or budgets; see [`hf_elastic.checkpoints.described.described_config`].
            verify (`bool`, *optional*, defaults to `False`):
                Compare all weights with their checksums, also those that lie in the cache already: with the Hub's, and of parts of files and
                folders with those that `save_pretrained` wrote. Parts of which there are none are not taken; whole files are fetched.
            packed (`bool`, *optional*, defaults to `False`):
                Of a quantised checkpoint, keep the codes in memory and decode weights whenever they are used: less memory, slower, for inference
                only; see [`hf_elastic.submodels.packed`]. Otherwise weights are decoded while they are read, and it is a model like others.
            kwargs:
                As in `PreTrainedModel.from_pretrained` (`dtype`, `device_map`, `attn_implementation`, `output_loading_info`, Hub
                arguments, ...). Fields of the parent's config override it.

        Returns:
            [`ElasticPreTrainedModel`]: In evaluation mode. With `output_loading_info=True` a tuple with the loading info. `model.router` is
                the router that was saved with it, frozen; `None` if there was none, or for a smaller size.

        Raises:
            `UnknownBudgetError`: no such budget, or none small enough.
            `ElasticConfigError`: a plain parent, or a config that does not hold together.
            `CheckpointError`: files are missing, damaged, or disagree with the config. Nothing is ever initialised at random.
        """
        if pretrained_model_name_or_path is None:
            return _from_state_dict(cls, config, budget, *model_args, **kwargs)
        if isinstance(pretrained_model_name_or_path, LoadedFrom):
            config, budget, elastic_config = as_loaded(
                pretrained_model_name_or_path, config, budget, elastic_config, kwargs
            )
        hub = {key: kwargs.pop(key) for key in _HUB_KWARGS if kwargs.get(key) is not None}
        if hub.get("subfolder") and os.path.isdir(
            pretrained_model_name_or_path
        ):  # named whole, as who loads it again has only the name
            pretrained_model_name_or_path = os.path.join(pretrained_model_name_or_path, hub.pop("subfolder"))
        hub = pinned(pretrained_model_name_or_path, hub)
        elastic = load_config(pretrained_model_name_or_path, config, elastic_config, hub)
        plain, variant = elastic_config is not None, kwargs.pop("variant", None)
        elastic = with_encodings(pretrained_model_name_or_path, elastic, variant, plain=plain, **hub)
        stock_kwargs = checked_kwargs(kwargs)
        dtype = load_dtype(stock_kwargs, elastic)
        places = (kwargs.get("device_map"), kwargs.get("max_memory"))
        submodel = resolve_for_loading(elastic, budget, dtype, *places, packed=packed)
        concrete = concrete_class(cls, elastic.parent_config)
        head = concrete._stock_class is elastic.architecture.causal_class
        ignored = elastic.architecture.ignored(concrete)
        if packed:
            refuse_unpackable(elastic, pretrained_model_name_or_path, stock_kwargs, head)
        checkpoint = open_checkpoint(
            pretrained_model_name_or_path, elastic, submodel, variant, head=head, ignored=ignored, verify=verify, **hub
        )
        dtype = dtype or checkpoint.dtype()
        lazy = checkpoint.lazy_slice(elastic.architecture, elastic.parent_config, submodel, head=head, dtype=dtype)
        sliced = elastic.restrict(submodel)
        decoded = False
        if packed:
            lazy = without_weights(lazy, sliced.encodings)
        elif sliced.encodings:
            decoded = True
            sliced = sliced.quantized(None)  # its weights are decoded while they are read
        whole = submodel == elastic.architecture.full(elastic.parent_config)
        if not whole or hasattr(elastic, CUT_FROM):
            sliced.cut_from = cut_from(elastic, submodel, pretrained_model_name_or_path, hub)
        note_left_out(sliced, not_passengers(elastic.host, checkpoint.ignored), pretrained_model_name_or_path)
        passengers = open_passengers(pretrained_model_name_or_path, elastic, hub, verify)
        router = read_router(sliced, pretrained_model_name_or_path, verify=verify, **hub)
        stock = configured(sliced.parent_config, elastic, stock_kwargs, concrete)
        stock.__dict__.pop("quantization_config", None)
        stock_kwargs["dtype"] = dtype
        stock_kwargs.setdefault("generation_config", generation_config(concrete, pretrained_model_name_or_path, hub))
        want_info = stock_kwargs.pop("output_loading_info", False)
        if packed:
            checkpoint.refuse_unequal(elastic.architecture, elastic.parent_config, submodel)
            stock._experts_implementation = "eager"
        use_eager_experts_if_misaligned(stock, elastic.architecture, dtype)
        model, info = PreTrainedModel.from_pretrained.__func__(
            concrete, None, *model_args, config=stock, state_dict=lazy, output_loading_info=True, **stock_kwargs
        )
        # The loader notes which of the Hub's names it met, for saving; it met none here. Without the note, saving uses all of them.
        model.__dict__.pop("_weight_conversions", None)
        refuse_incomplete(info, pretrained_model_name_or_path)
        set_buffers(model)
        if packed:
            coded = checkpoint.coded_slice(elastic.architecture, elastic.parent_config, submodel, head=head)
            pack(model, elastic.architecture, read_codes(coded, sliced), sliced.encodings)
        model._hub_kwargs = {key: hub[key] for key in WHERE if key in hub}
        name = LoadedFrom(
            str(pretrained_model_name_or_path),
            None if whole else submodel,
            None if elastic_config is None else elastic,
            model._hub_kwargs,
        )
        sliced._name_or_path = model.name_or_path = model.config._name_or_path = name
        model._adopt(sliced, router)
        model._passengers = passengers
        model._decoded_from = str(pretrained_model_name_or_path) if decoded else None
        model._loaded_from = loaded_from(pretrained_model_name_or_path, hub)
        return (model, info) if want_info else model

    def __repr__(self) -> str:
        return f"{self._sizes_shown()}{super().__repr__()}"

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the vocabulary of everything that is loaded; budgets and their counts follow."""
        active = self.submodel
        self.forget_budgets()
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        old, router = self.elastic_config, self.router
        section: dict[str, Any] = {
            "axes": old.axes,
            "budgets": {name: {"sizes": entry["sizes"]} for name, entry in old.budgets.items()},
        }
        if old.interpolated:
            section["interpolated"] = [{"sizes": entry["sizes"]} for entry in old.interpolated]
        section |= {key: old.elastic[key] for key in ("handover", "quantization") if key in old.elastic}
        self.elastic_config = ElasticConfig(parent_config=self.config, elastic=section)
        for key in (CUT_FROM, LEFT_OUT, HOST):
            if hasattr(old, key):
                setattr(self.elastic_config, key, getattr(old, key))
        try:
            self.attach_router(None if router is None else router.rebuilt(self.elastic_config))
        except ElasticConfigError as error:  # a vocabulary so small that a target is above the parent
            self.attach_router(None)
            warnings.warn(f"the router is taken off: {error}", stacklevel=2)
        self.set_budget(active)
        return embeddings


class ElasticForCausalLM(SpeculationMixin, PhasedGenerationMixin, ElasticPreTrainedModel, GenerationMixin):
    """A causal language model with nested sizes.

    Example:

    ```python
    >>> import hf_elastic
    >>> from transformers import AutoModelForCausalLM

    >>> model = AutoModelForCausalLM.from_pretrained(repo, budget="small")  # reads only that size
    >>> family = AutoModelForCausalLM.from_pretrained(repo)  # all sizes on one set of weights
    >>> with family.at("small"):
    ...     family.generate(**inputs)
    ```
    """


class ElasticModel(ElasticPreTrainedModel):
    """The base model, without a head; what `AutoModel` gives for an elastic checkpoint."""


def _make_class(facade: type[ElasticPreTrainedModel], stock: type[PreTrainedModel]) -> type[ElasticPreTrainedModel]:
    namespace = {
        "__module__": __name__,  # classes are found here by name, so that instances pickle
        "__doc__": f"[`{stock.__name__}`] with nested sizes; see [`{facade.__name__}`].",
        "config_class": stock.config_class,
        "_stock_class": stock,
    }
    made = type(f"Elastic{stock.__name__}", (facade, stock), namespace)
    # Upstream ignores the key conversions of a model_type for classes that are not its own; claim them by name.
    claimed = conversions(stock.config_class.model_type)
    if claimed is not None:
        register_checkpoint_conversion_mapping(made.__name__, claimed, overwrite=True)
    return made


_CONCRETE: dict[tuple[type, str], type[ElasticPreTrainedModel]] = {}


def _make_classes(architecture: Architecture) -> None:
    """The elastic classes of a table, when it is loaded; the stock ones say what they cannot do."""
    stocks = {ElasticForCausalLM: architecture.causal_class, ElasticModel: architecture.base_class}
    for facade, stock in stocks.items():
        made = _CONCRETE[facade, architecture.model_type] = _make_class(facade, stock)
        globals()[made.__name__] = made
        _explain_budget(stock, facade)
    # The text-generation pipeline knows classes by name and calls others unsupported, registered or not.
    known = (made.__name__ for (facade, _), made in _CONCRETE.items() if facade is ElasticForCausalLM)
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[ElasticConfig.model_type] = tuple(known)


def __getattr__(name: str) -> Any:
    """Classes of tables that are not loaded yet: whoever unpickles a model asks for its class by name."""
    if name.startswith("Elastic"):
        for model_type in ARCHITECTURES:
            get_architecture(model_type)
            if name in globals():
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def concrete_class(cls: type[ElasticPreTrainedModel], stock: PreTrainedConfig) -> type[ElasticPreTrainedModel]:
    """The class made of `ElasticForCausalLM` or `ElasticModel` (whichever `cls` is one of) and the stock class of a parent."""
    get_architecture(stock.model_type)
    facade = ElasticModel if issubclass(cls, ElasticModel) else ElasticForCausalLM
    return _CONCRETE[facade, stock.model_type]


def _parent_of(config: PreTrainedConfig) -> PreTrainedConfig:
    return config.parent_config if isinstance(config, ElasticConfig) else config


def _from_state_dict(cls: type, config: Any, budget: Any, *model_args: Any, **kwargs: Any) -> Any:
    """The stock loader for weights that are in memory already, under the names of the parent."""
    if budget is not None:
        raise ElasticConfigError(
            "budget= needs a checkpoint to cut from; load the state dict whole, then set_budget()."
        )
    if not isinstance(config, PreTrainedConfig):
        raise ElasticConfigError(
            f"config={shown(config)}: state_dict= needs the ElasticConfig or stock config of its weights."
        )
    concrete = concrete_class(cls, _parent_of(config))
    loaded = PreTrainedModel.from_pretrained.__func__(
        concrete, None, *model_args, config=_parent_of(config), **kwargs | {"output_loading_info": True}
    )
    model, info = loaded
    model.__dict__.pop("_weight_conversions", None)  # as above: it is saved under the Hub's names
    model.name_or_path = model.config.name_or_path = (
        ""  # upstream notes "None", which is no repository to look for a tokenizer in
    )
    refuse_incomplete(info, "the state dict")
    set_buffers(model)
    if isinstance(config, ElasticConfig):
        model._adopt(config)
    return (model, info) if kwargs.get("output_loading_info") else model


def _explain_budget(stock: type[PreTrainedModel], facade: type[ElasticPreTrainedModel]) -> None:
    """Let a stock class say what is wrong with `budget=` and `elastic_config=`, which reaches it when an AutoClass loads a plain parent.

    It would refuse it anyway, with a bare `TypeError` from its `__init__`. The name of a loaded elastic model ([`LoadedFrom`]) gives that
    model again, and the name of what is loaded from a subfolder says so. Nothing else of it changes, and nothing of its subclasses.
    """
    inherited = stock.from_pretrained.__func__

    @functools.wraps(inherited)
    def from_pretrained(
        cls: type[PreTrainedModel], pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> Any:
        repo = pretrained_model_name_or_path  # which may be given by its name
        if cls is stock and isinstance(repo, LoadedFrom) and not repo.stock:
            return facade.from_pretrained(repo, *args, **kwargs)
        if cls is stock and "elastic_config" in kwargs:
            raise ElasticConfigError(
                "elastic_config= is for ElasticForCausalLM.from_pretrained and ElasticModel.from_pretrained."
            )
        if cls is stock and "budget" in kwargs:
            raise plain_parent_error(repo, cls.config_class.model_type)
        if isinstance(repo, LoadedFrom):
            repo.add_hub(kwargs)
        given = dict(kwargs)
        loaded = inherited(cls, repo, *args, **kwargs)
        if cls is stock and repo is not None and given.get("subfolder"):
            name_stock(loaded[0] if isinstance(loaded, tuple) else loaded, str(repo), given)
        return loaded

    stock.from_pretrained = classmethod(from_pretrained)


def _read_configs_by_name() -> None:
    """Let `AutoConfig`, which the AutoClasses ask first, look for the config of a loaded model ([`LoadedFrom`]) where that was loaded from."""
    inherited = AutoConfig.from_pretrained.__func__

    @functools.wraps(inherited)
    def from_pretrained(cls: type[AutoConfig], pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        repo = pretrained_model_name_or_path
        if isinstance(repo, LoadedFrom):
            repo.add_hub(kwargs)
            if not repo:
                repo.refuse_unsaved()
        elif kwargs.get("budget") is not None or kwargs.get("elastic_config") is not None:
            refuse_out_of_reach(repo, kwargs)  # sooner than upstream, which tries for most of a minute
        found = inherited(cls, repo, *args, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        for part in (config, getattr(config, "text_config", None)):
            model_type: Any = getattr(part, "model_type", None)
            if model_type in ARCHITECTURES:
                get_architecture(model_type)  # from here on the stock class explains `budget=` (`_explain_budget`)
        return found

    AutoConfig.from_pretrained = classmethod(from_pretrained)


ARCHITECTURES.when_loaded(_make_classes)
_read_configs_by_name()
AutoConfig.register(ElasticConfig.model_type, ElasticConfig)
AutoModel.register(ElasticConfig, ElasticModel)
AutoModelForCausalLM.register(ElasticConfig, ElasticForCausalLM)
add_to_transformers(ElasticForCausalLM, ElasticModel)
