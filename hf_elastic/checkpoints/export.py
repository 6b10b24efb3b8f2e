"""Export of a submodel as a stock checkpoint, which plain transformers loads without this package."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..architectures import Architecture
from ..architectures.coded_programs import Coded
from ..architectures.hosts import Host
from ..architectures.portability import warn_if_not_portable
from ..architectures.submodel import Submodel
from ..configuration.budgets import Budget
from ..configuration.leaving_out import LEFT_OUT, left_out
from ..configuration.quantized import renumbered
from ..configuration.section import CUT_FROM
from ..configuration_elastic import ElasticConfig
from ..errors import ExportError, refuse_misspelt
from ..quantization.layouts import (
    MODELOPT_FILE,
    CodedLayout,
    check_coded_layout,
    coded_in,
    modelopt_file,
    quantization_config,
)
from ..storage.reading import Readable
from ..storage.streaming import write_shards
from ..storage.tokenizer_files import read_tokenizer_file, tokenizer_files
from .coded import coded_content, decoded_content
from .origin import cut_from, named, refuse_loss
from .packing import HeldCodes
from .passengers import Passengers, add_shard, processor_files, within
from .replacing import checked_target, replacing


class ExportMixin:
    """`export` for an elastic model."""

    elastic_config: ElasticConfig

    def export(
        self,
        save_directory: str | os.PathLike[str],
        budget: Budget | Submodel = None,
        *,
        heterogeneous: bool = False,
        text_only: bool = False,
        tokenizer: Any = None,
        quantized: bool | None = None,
        layout: CodedLayout | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one size as a plain checkpoint in the parent's Hub layout.

        Tokenizer files and the generation config come along: the tokenizer given, or the files beside the checkpoint that this
        model was loaded from. Where the parent is part of a larger model, such as a vision-language model, and the family keeps the rest
        of it, so does the export: it is that larger model with the parent at this size.

        Args:
            save_directory (`str` or `os.PathLike`): Folder to write into. If writing fails, what it held before is untouched.
            budget (*optional*): Which size; defaults to the active one.
            heterogeneous (`bool`, *optional*, defaults to `False`):
                Allow sizes that differ per layer. They are written in transformers' own `per_layer_config` form, which its stock
                classes record but do not build from, so loading them needs this package: `ElasticForCausalLM.from_pretrained`.
            text_only (`bool`, *optional*, defaults to `False`): Write the parent at this size alone, without the rest of the larger model.
            tokenizer (*optional*): Tokenizer to save along.
            quantized (`bool`, *optional*):
                Of a packed model (`from_pretrained(..., packed=True)`), write codes and scales as they are, the default, or with `False` weights in
                the model's type. Other models hold weights; [`hf_elastic.export_checkpoint`] writes codes from files.
            layout (`str`, *optional*, defaults to `"compressed-tensors"`):
                Of codes and scales: or `"modelopt"`, which holds NVFP4; see [`hf_elastic.quantization.layouts`].
            kwargs: As in `PreTrainedModel.save_pretrained` (`max_shard_size`, ...).

        Warns:
            `PortabilityWarning`: programs are known that do not run this size, or run it wrongly; see [`hf_elastic.architectures.portability`].

        Raises:
            `ExportError`: sizes differ per layer and `heterogeneous` is not set, codes are asked for that there are not, or that the layout does not
                hold. Nothing is written.
            `ElasticConfigError`: the folder holds the family that this model was loaded from.
            `CheckpointError`: tokenizer files beside the checkpoint are damaged. Nothing is written.
        """
        refuse_misspelt(kwargs, "budget", "heterogeneous", "text_only", "quantized", "layout")
        submodel = self.submodel if budget is None else self.elastic_config.resolve(budget)  # type: ignore[attr-defined]
        config = exported_config(self.elastic_config, submodel, heterogeneous)
        coded = self._coded(quantized, layout)
        passengers = None if text_only else self._aboard(submodel, config.is_heterogeneous)
        checked_target(save_directory)
        refuse_loss(getattr(self, "_loaded_from", None), save_directory)
        hub = getattr(self, "_hub_kwargs", {})
        source = str(self.name_or_path)  # type: ignore[attr-defined]
        beside = _tokenizer_beside(source, hub) if tokenizer is None else {}
        beside |= {} if passengers is None else processor_files(source, hub)
        self._warn_of_programs(self.elastic_config, submodel, coded=coded)
        whole = self.elastic_config.host if passengers is not None else None
        with self.exposed(submodel), replacing(save_directory) as scratch:  # type: ignore[attr-defined]
            if self.elastic_config.encodings:
                write_content(scratch, self._packed_content(coded), self.elastic_config.architecture, whole, **kwargs)
                self.generation_config.save_pretrained(scratch)  # type: ignore[attr-defined]
            else:
                with within(self, whole):
                    self._write_stock(scratch, **kwargs)  # type: ignore[attr-defined]
            self._write_stock_config(config, submodel, scratch, whole=whole is not None, coded=coded)
            if passengers is not None:
                add_shard(scratch, passengers)
            if tokenizer is not None:
                tokenizer.save_pretrained(scratch)
            for name, path in beside.items():
                shutil.copyfile(path, scratch / name)
            for_old_readers(scratch)

    def _aboard(self, submodel: Submodel, heterogeneous: bool) -> dict[str, torch.Tensor] | None:
        """The passengers of an export at a size; `None` where there are none."""
        kept: Passengers | None = getattr(self, "_passengers", None)
        if kept is None or self.elastic_config.host is None or not self.can_generate():  # type: ignore[attr-defined]
            return None
        if heterogeneous:
            raise ExportError(
                f"sizes that differ per layer cannot be written as part of a {kept.host.model_type}, which only stock classes load: give "
                "text_only=True for the parent alone."
            )
        return kept.at(submodel.at(None), self.dtype)  # type: ignore[attr-defined]

    def _coded(self, quantized: bool | None, layout: CodedLayout | None) -> Coded:
        """What an export is stored in."""
        encodings = self.elastic_config.encodings
        if (quantized or layout is not None) and not encodings:
            raise ExportError(
                "this model holds weights, not codes, also where it was read from codes. Export codes from the files: hf-elastic export, or "
                "hf_elastic.export_checkpoint(); or load the model with packed=True."
            )
        if quantized is False or not encodings:
            return Coded({}, "compressed-tensors")
        return Coded(encodings, check_coded_layout(layout or "compressed-tensors"))

    def _packed_content(self, coded: Coded) -> dict[str, Readable]:
        """What the files of an export hold, of a model that holds codes and is at that size."""
        elastic = self.elastic_config.restrict(self.submodel)  # type: ignore[attr-defined]
        architecture, config = elastic.architecture, elastic.parent_config
        held = HeldCodes(self)
        if coded.encodings:
            return coded_content(held, elastic, architecture.full(config), coded.layout)
        dtype: torch.dtype = self.dtype  # type: ignore[attr-defined]
        return decoded_content(held, elastic, architecture.full(config), dtype)

    def _warn_of_programs(
        self, elastic: ElasticConfig, submodel: Submodel, what: str | None = None, coded: Coded | None = None
    ) -> None:
        what = what or f"exported, size {named(cut_from(elastic, submodel, '', {}))!r}"
        dtype: torch.dtype = self.dtype  # type: ignore[attr-defined]
        warn_if_not_portable(elastic.architecture, elastic.parent_config, submodel, dtype, what, coded)

    def _write_stock_config(
        self,
        config: PreTrainedConfig,
        submodel: Submodel,
        directory: Path,
        whole: bool = False,
        coded: Coded | None = None,
    ) -> None:
        """`whole`: that of the larger model, with the size in it."""
        config.dtype = self.dtype  # type: ignore[attr-defined]
        origin, causal = self._cut_from(submodel), self.can_generate()  # type: ignore[attr-defined]
        write_stock_config(
            self.elastic_config, config, submodel, directory, origin, causal=causal, whole=whole, coded=coded
        )


def exported_config(elastic: ElasticConfig, submodel: Submodel, heterogeneous: bool) -> PreTrainedConfig:
    """The stock config of a size, or [`ExportError`] if stock classes do not build it and that was not asked for."""
    config = elastic.stock_config(submodel)
    if config.is_heterogeneous and not heterogeneous:
        layers = sorted(config._heterogeneity_spec.per_layer_overrides)
        raise ExportError(
            f"sizes differ per layer ({', '.join(sorted(config.per_layer_attributes))} in layers {layers}), which stock "
            f"{config.model_type} classes cannot load. Choose a budget with one size per axis, save it with save_pretrained, or "
            "pass heterogeneous=True to write a checkpoint that needs hf_elastic to load."
        )
    return config


def write_content(
    folder: Path,
    content: Mapping[str, Readable],
    architecture: Architecture,
    host: Host | None = None,
    *,
    max_shard_size: int | str = "5GB",
    progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Write the weights of a plain checkpoint, or of the larger model around it, as the file or files of a stock class."""
    if host is not None:
        base = architecture.disk_prefix
        content = {
            host.prefix + name.removeprefix(base) if name.startswith(base) else name: part
            for name, part in content.items()
        }
    write_shards(folder, "model", content, max_shard_size, progress)


def write_stock_config(
    elastic: ElasticConfig,
    config: PreTrainedConfig,
    submodel: Submodel,
    directory: Path,
    origin: dict[str, Any],
    *,
    causal: bool = True,
    whole: bool = False,
    coded: Coded | None = None,
) -> None:
    """Write the `config.json` of a size as a plain checkpoint, and what readers of its layout look for beside it.

    Args:
        elastic (`ElasticConfig`): What it is a size of.
        config (`PreTrainedConfig`): Its stock config.
        origin (`dict`): What it says of where it is from, see [`hf_elastic.checkpoints.origin`].
        causal (`bool`, *optional*, defaults to `True`): With a head.
        whole (`bool`, *optional*, defaults to `False`): That of the larger model, with the size in it.
        coded ([`Coded`], *optional*): What weights are stored in; as in the family if not given.
    """
    architecture, host = elastic.architecture, elastic.host if whole else None
    coded = coded_in(elastic.encodings) if coded is None else coded
    stock = architecture.causal_class if causal else architecture.base_class
    config.architectures = [stock.__name__]
    written = exported_fields(config, architecture)
    written.pop("quantization_config", None)  # of what it was cut from, with other numbers of layers
    if host is not None:
        around = host.fields_at(elastic.host_config, submodel.at(None))
        inner = {key: value for key, value in written.items() if key not in ("architectures", "transformers_version")}
        version = written.get("transformers_version")
        written = {**around, "dtype": written["dtype"], "transformers_version": version, host.section: inner}
    written[CUT_FROM] = origin
    if groups := left_out(elastic):
        written[LEFT_OUT] = groups
    if coded.encodings:
        encodings = renumbered(architecture, elastic.parent_config, coded.encodings, submodel)
        said = quantization_config(encodings, architecture, config, coded.layout, host)
        written["quantization_config"] = said
        if coded.layout == "modelopt":
            _write_json(directory / MODELOPT_FILE, modelopt_file(said))
    _write_json(directory / "config.json", written)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def exported_fields(config: PreTrainedConfig, architecture: Architecture) -> dict[str, Any]:
    """What the `config.json` of a plain checkpoint says: what the stock class reads as this config, in the words that other programs know.

    Older versions of transformers, llama.cpp, SGLang and others read the file themselves, and know its names from before transformers 5.
    """
    fields = config._decode_special_floats(json.loads(config.to_json_string()))
    defaults = type(config).default_config_fields()
    for name, value in list(fields.items()):
        # `{"__float__": "Infinity"}` is nothing that others read, and `Infinity` is no JSON to some: left out where it is the default.
        if _has_infinity(value) and name in defaults and value == _as_json(defaults[name]):
            del fields[name]
    rope = fields.get("rope_parameters")
    if isinstance(rope, dict) and rope.get("rope_theta") is not None:  # nested per kind of layer, it has none
        fields["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            fields["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    for name, value in architecture.export_fields(config).items():
        if value is None:
            fields.pop(name, None)
        else:
            fields[name] = value
    return fields


def _has_infinity(value: Any) -> bool:
    return any(map(_has_infinity, value)) if isinstance(value, list) else value in (math.inf, -math.inf)


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def for_old_readers(directory: Path) -> None:
    """Name the tokenizer's class as versions before transformers 5 do; later ones read that, too."""
    path = directory / "tokenizer_config.json"
    if not path.exists():
        return
    written = read_tokenizer_file(path)
    if written.get("tokenizer_class") == "TokenizersBackend":
        written["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tokenizer_beside(source: str, hub: dict[str, Any]) -> dict[str, Path]:
    """The tokenizer files of the folder or Hub repository that a model was loaded from, those that it has."""
    if not source:
        return {}
    try:
        return tokenizer_files(source, hub)
    except OSError:
        # It was loaded from there, so it may have a tokenizer; a model made in memory can be named anything.
        if os.path.isdir(source) or "revision" in hub:
            raise
        return {}
