"""`save_pretrained` of an elastic checkpoint."""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ..architectures import uniform
from ..architectures.submodel import Submodel
from ..configuration.budgets import Budget
from ..configuration.remote_code import AUTO_MAP, write_module
from ..configuration.section import CUT_FROM, checked_section
from ..configuration_elastic import ElasticConfig
from ..errors import CheckpointError, ElasticConfigError, refuse_misspelt, users_level
from ..quantization.layouts import quantization_config, stored_layout
from ..routing.router import BudgetRouter
from ..storage.checksums import write_checksums
from ..storage.files import INDEX_NAME, find_files
from ..submodels.packed import is_packed
from .checkpoint import Checkpoint
from .nested import FOLDER, folder_names, write_nested
from .origin import cut_from, refuse_loss
from .packing import write_codes
from .passengers import Passengers, processor_files
from .replacing import checked_target, replacing

_HUB_KWARGS = ("repo_id", "commit_message", "create_pr", "private", "token")
Layout = Literal["stock", "nested"]


class SavingMixin:
    """`save_pretrained` of an elastic checkpoint, and the router that goes with it."""

    elastic_config: ElasticConfig
    _passengers: Passengers | None = None

    @property
    def router(self) -> BudgetRouter | None:
        """The router that chose the budgets, or is choosing them, if there is one. It is no part of the module tree: `parameters()`,
        `state_dict()`, `to()` and exports are those of the model alone."""
        return self.__dict__.get("_router") if "router" in self.elastic_config.elastic else None

    def attach_router(self, router: BudgetRouter | None) -> None:
        """Have a router saved with the model from now on; `None` takes it off. Slices (`budget=`) are saved without it."""
        section = {
            key: value
            for key, value in self.elastic_config.elastic.items()
            if key not in ("router", "files", "version")
        }
        if router is not None:
            section["router"] = router.describe()
        self.elastic_config.elastic = checked_section(self.elastic_config.parent_config, section)
        self.__dict__["_router"] = router  # nn.Module's own assignment would make it a child

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *args: Any,
        budget: Budget = None,
        layout: Layout | None = None,
        push_to_hub: bool = False,
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Save an elastic checkpoint, in the parent's own Hub key layout, that nests the same budgets, with the router if there is one.

        Saves everything that is loaded, whichever budget is active, so that no weight is lost by saving while switched.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder to write into. If saving fails, what it held before is untouched. If the process is killed, it holds the old checkpoint, the
                new one, or no `config.json`; then [`hf_elastic.recover`] or the next save gives the new one.
            budget (*optional*): Save only this size and what nests in it, without the router.
            layout (`str`, *optional*):
                `"stock"`, the default for a folder, writes the weights as the stock class does. `"nested"`, the default for the Hub, writes files per budget, so that who wants one downloads
                exactly what it needs, see [`hf_elastic.checkpoints.nested`]; the folder then needs room for two copies while it is saved.
            push_to_hub (`bool`, *optional*, defaults to `False`): As in `PreTrainedModel.save_pretrained`.
            kwargs: As in `PreTrainedModel.save_pretrained` (`max_shard_size`, `variant`, ...).

        Raises:
            `ElasticConfigError`: less than the family would be saved over it.
            `CheckpointError`: something is in the way, or the disk is full.
        """
        refuse_misspelt(kwargs, "budget", "layout")
        check_layout(layout or "stock", kwargs)
        if push_to_hub and budget is not None:  # pushing saves again, and knows of no budget
            raise ElasticConfigError(
                f"push_to_hub=True pushes everything that is loaded, not budget={budget!r}; save that budget into a folder, load it "
                "from there and push it."
            )
        submodel = self.elastic_config.resolve(budget)
        elastic = self.elastic_config if budget is None else self.elastic_config.restrict(submodel)
        if elastic is not self.elastic_config:
            elastic.cut_from = self._cut_from(submodel)
        checked_target(save_directory)
        refuse_loss(getattr(self, "_loaded_from", None), save_directory, elastic)
        hub = {key: kwargs.pop(key) for key in _HUB_KWARGS if key in kwargs}
        with self.exposed(submodel):  # type: ignore[attr-defined]
            if not is_main_process:  # the main process writes; the others only take part in gathering
                self._write_stock(save_directory, *args, is_main_process=False, **kwargs)
                return
            self._check_state_dict(kwargs.get("state_dict"))
            for member, what in self._for_others(elastic, layout).items():
                self._warn_of_programs(elastic, member, what)  # type: ignore[attr-defined]
            with replacing(save_directory) as scratch:
                self._write_stock(scratch, *args, **kwargs)
                files = self._nest(scratch, elastic, kwargs.get("max_shard_size")) if layout == "nested" else None
                if (described := elastic.elastic.get("router")) is not None:
                    if self.router is None or self.router.describe() != described:
                        raise CheckpointError(
                            "elastic_config describes another router than the one that is attached; call attach_router()."
                        )
                    self.router.save(scratch)
                if self._keeps_passengers(elastic) and self._passengers is not None:
                    beside = processor_files(str(self.name_or_path), getattr(self, "_hub_kwargs", {}))  # type: ignore[attr-defined]
                    self._passengers.save(scratch, submodel.at(None), self.dtype, beside)  # type: ignore[attr-defined]
                write_module(scratch)
                write_checksums(scratch, kwargs.get("variant"))
                self._written_config(elastic, files).save_pretrained(scratch)
        if push_to_hub:
            repo_id = hub.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, layout=layout or "nested", **hub)  # type: ignore[attr-defined]

    def _keeps_passengers(self, elastic: ElasticConfig) -> bool:
        """Whether what is beside the parent in a larger model can be saved along. If its weights never were here, the config says no more of it."""
        if elastic.host is not None and self._passengers is None:
            warnings.warn(
                f"saved without {', '.join(elastic.host.passengers)}: the config says that the parent is part of a {elastic.host.model_type}, but "
                "this model was made without the rest of its weights.",
                UserWarning,
                stacklevel=users_level(),
            )
            del elastic.host_config
        return elastic.host is not None

    def _for_others(self, elastic: ElasticConfig, layout: Layout | None) -> dict[Submodel, str | None]:
        """The sizes that a save makes for programs that know one size, a slice and the stock folder of the nested layout, and what a warning calls them."""
        whole = elastic.architecture.full(elastic.parent_config)
        members: dict[Submodel, str | None] = {whole: None} if hasattr(elastic, CUT_FROM) else {}
        if layout == "nested":
            family = elastic.family()
            name, smallest = list(family.items())[-1]
            members[smallest] = f"{FOLDER}/{folder_names(list(reversed(family)))[name]}, which other programs read,"
        return members

    def _nest(
        self, folder: Path, elastic: ElasticConfig, max_shard_size: int | str | None
    ) -> dict[str, dict[str, int]]:
        files, place = nest(folder, elastic, max_shard_size or "5GB")
        smallest = list(elastic.family().values())[-1]
        self._write_stock_config(elastic.stock_config(smallest), smallest, place)  # type: ignore[attr-defined]
        return files

    def _cut_from(self, submodel: Submodel) -> dict[str, Any]:
        repo, hub = self.name_or_path, getattr(self, "_hub_kwargs", {})  # type: ignore[attr-defined]
        return cut_from(self.elastic_config, submodel, repo, hub)

    def _check_state_dict(self, state_dict: Mapping[str, torch.Tensor] | None) -> None:
        """Refuse weights of another size than what is saved, such as a state dict that was taken while a smaller budget was active."""
        if state_dict is None or getattr(self, "hf_quantizer", None) is not None:
            return
        mine: Mapping[str, torch.Tensor] = self.state_dict()  # type: ignore[attr-defined]
        wrong = [name for name in mine if name not in state_dict and name not in self._tied_names()]
        wrong += [name for name in mine if name in state_dict and state_dict[name].shape != mine[name].shape]
        wrong += [name for name in state_dict if name not in mine]
        if wrong:
            raise CheckpointError(
                f"state_dict= does not hold what is saved ({len(wrong)} differences, the first is {wrong[0]}); take it with "
                "set_budget(None), or leave it out."
            )

    def _write_stock(self, directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """The stock class's save; it writes the class's name into the config, which has to stay the stock one's."""
        if is_packed(self):  # type: ignore[arg-type]
            write_codes(self, Path(directory), kwargs.get("max_shard_size") or "5GB")
            return
        architectures = self.config.architectures  # type: ignore[attr-defined]
        views = self._active != self._full or "_taken_as" in self.__dict__  # type: ignore[attr-defined]
        if kwargs.get("state_dict") is None and views:
            kwargs["state_dict"] = self._untied_views()
        try:
            with uniform(self.config):  # type: ignore[attr-defined]
                super().save_pretrained(directory, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.config.architectures = architectures  # type: ignore[attr-defined]

    def _untied_views(self) -> dict[str, torch.Tensor]:
        """The state dict of a smaller budget without tied names, which upstream only finds among contiguous tensors."""
        tied = self._tied_names()
        return {name: tensor for name, tensor in self.state_dict().items() if name not in tied}  # type: ignore[attr-defined]

    def _tied_names(self) -> set[str]:
        return {rule.name for rule in self.elastic_config.architecture.rules(self.config) if rule.copy_of}  # type: ignore[attr-defined]

    def _written_config(self, elastic: ElasticConfig, files: dict[str, dict[str, int]] | None = None) -> ElasticConfig:
        return written_config(elastic, self.dtype, files, causal=self.can_generate())  # type: ignore[attr-defined]


def nest(folder: Path, elastic: ElasticConfig, max_shard_size: int | str) -> tuple[dict[str, dict[str, int]], Path]:
    """Turn the weights of a folder in the stock layout into the nested one.

    Returns:
        The files per budget, and the folder of the smallest, which is a plain checkpoint but for its `config.json`.
    """
    stock = find_files(folder)
    files = write_nested(folder, Checkpoint(stock, elastic.encodings), elastic, max_shard_size)
    for file in (*stock, folder / INDEX_NAME):
        file.unlink(missing_ok=True)
    place = (folder / next(iter(files[next(iter(files))]))).parent
    if (generation := folder / "generation_config.json").exists():
        shutil.copyfile(generation, place / generation.name)
    return files, place


def written_config(
    elastic: ElasticConfig, dtype: torch.dtype, files: dict[str, dict[str, int]] | None = None, *, causal: bool = True
) -> ElasticConfig:
    """The config of a checkpoint that is written, with the files of the nested layout if it is in that."""
    elastic.dtype = elastic.parent_config.dtype = dtype
    elastic.architectures = ["ElasticForCausalLM" if causal else "ElasticModel"]
    elastic.auto_map = dict(AUTO_MAP)
    elastic.__dict__.pop("quantization_config", None)
    if encodings := elastic.encodings:  # for others: what is read here is the section
        parent, layout = elastic.parent_config, stored_layout(encodings)
        elastic.quantization_config = quantization_config(encodings, elastic.architecture, parent, layout)
    if files is None:
        return elastic
    written = copy.copy(elastic)
    section = {key: value for key, value in elastic.elastic.items() if key != "version"}
    written.elastic = checked_section(elastic.parent_config, {**section, "files": files})
    return written


def check_layout(layout: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise [`ElasticConfigError`] for a layout that there is not, or one that has no place for an argument."""
    if layout not in get_args(Layout):
        raise ElasticConfigError(f"layout={layout!r} must be one of {', '.join(map(repr, get_args(Layout)))}.")
    if layout == "nested" and kwargs.get("variant") is not None:
        raise ElasticConfigError(
            f"variant={kwargs['variant']!r}: the nested layout has no variants; use layout='stock'."
        )
