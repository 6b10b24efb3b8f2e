"""Export of a submodel as a stock checkpoint, which plain transformers loads without this package."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from .budgets import Budget
from .configuration_elastic import ElasticConfig
from .errors import ExportError, UnreachableError, refuse_misspelt
from .files import find_file
from .origin import CUT_FROM
from .saving import replacing
from .submodel import Submodel

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


class ExportMixin:
    """`export` for an elastic model."""

    elastic_config: ElasticConfig

    def export(
        self,
        save_directory: str | os.PathLike[str],
        budget: Budget | Submodel = None,
        *,
        heterogeneous: bool = False,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Write one size as a plain checkpoint in the parent's Hub layout.

        Tokenizer files and the generation config come along: the tokenizer given, or the files beside the checkpoint that this
        model was loaded from.

        Args:
            save_directory (`str` or `os.PathLike`): Folder to write into. If writing fails, what it held before is untouched.
            budget (*optional*): Which size; defaults to the active one.
            heterogeneous (`bool`, *optional*, defaults to `False`):
                Allow sizes that differ per layer. They are written in transformers' own `per_layer_config` form, which its stock
                classes record but do not build from, so loading them needs this package: `ElasticForCausalLM.from_pretrained`.
            tokenizer (*optional*): Tokenizer to save along.
            kwargs: As in `PreTrainedModel.save_pretrained` (`max_shard_size`, ...).

        Raises:
            `ExportError`: sizes differ per layer and `heterogeneous` is not set. Nothing is written.
        """
        refuse_misspelt(kwargs, "budget", "heterogeneous")
        submodel = self.submodel if budget is None else self.elastic_config.resolve(budget)  # type: ignore[attr-defined]
        config = self.elastic_config.stock_config(submodel)
        if config.is_heterogeneous and not heterogeneous:
            layers = sorted(config._heterogeneity_spec.per_layer_overrides)
            raise ExportError(
                f"sizes differ per layer ({', '.join(sorted(config.per_layer_attributes))} in layers {layers}), which stock "
                f"{config.model_type} classes cannot load. Choose a budget with one size per axis, save it with save_pretrained, or "
                "pass heterogeneous=True to write a checkpoint that needs hf_elastic to load."
            )
        with self.exposed(submodel), replacing(save_directory) as scratch:  # type: ignore[attr-defined]
            self._write_stock(scratch, **kwargs)  # type: ignore[attr-defined]
            self._write_stock_config(config, submodel, scratch)
            if tokenizer is not None:
                tokenizer.save_pretrained(scratch)
            else:
                _copy_tokenizer(str(self.name_or_path), scratch, **getattr(self, "_hub_kwargs", {}))  # type: ignore[attr-defined]

    def _write_stock_config(self, config: PreTrainedConfig, submodel: Submodel, directory: Path) -> None:
        architecture = self.elastic_config.architecture
        stock = architecture.causal_class if self.can_generate() else architecture.base_class  # type: ignore[attr-defined]
        config.architectures = [stock.__name__]
        config.dtype = self.dtype  # type: ignore[attr-defined]
        path = directory / "config.json"
        config.to_json_file(path)
        origin = {CUT_FROM: self._cut_from(submodel)}  # type: ignore[attr-defined]
        written = {**json.loads(path.read_text(encoding="utf-8")), **architecture.export_fields(config), **origin}
        path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_tokenizer(source: str, target: Path, **hub: Any) -> None:
    """Copy the tokenizer files of a folder or Hub repository, those that it has."""
    for name in _TOKENIZER_FILES if source else ():
        try:
            path = find_file(source, name, hub)
        except UnreachableError:
            if "revision" in hub:  # it was loaded from there, so it may have a tokenizer
                raise
            return
        except OSError:  # a model made in memory can be named anything
            return
        if path is not None:
            shutil.copyfile(path, target / name)
