"""Checkpoints of a run: saved whole or not at all, loaded only into the run and the family that they are of."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTTrainer

from hf_elastic import ElasticForCausalLM
from hf_elastic.adapters.slices import FAMILY_FILE
from hf_elastic.checkpoints.replacing import replacing, write_error
from hf_elastic.routing.router import ROUTER_FILE

from .resuming import (
    STATE_FILE,
    check_adapter,
    check_family,
    check_training,
    is_complete,
    last_complete,
    saved_progress,
    training_state,
)
from .routing import REPORT_FILE

logger = logging.getLogger(__name__)

_ASIDE = "_replaced-"
"""Before the name of a checkpoint while another one of the same number is written. Upstream neither takes that for a checkpoint nor
uploads it."""


class CheckpointsMixin(SFTTrainer):
    """Saving and resuming of [`ElasticDistillationTrainer`]."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`. `resume_from_checkpoint=True` takes the last checkpoint that was saved completely. If the run ends, or a
        callback ends it, before `router_steps`, the router decides as it is then."""
        if resume_from_checkpoint is True:
            if self.args.should_save:
                put_back(Path(self.args.output_dir or "."))
            self.accelerator.wait_for_everyone()
            resume_from_checkpoint = last_complete(self.args.output_dir)
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        if self._undecided:
            if self.state.global_step < self.args.router_steps:
                logger.warning(
                    "the run ended after %d steps, before the %d of router_steps: the router decides as it is now.",
                    self.state.global_step,
                    self.args.router_steps,
                )
            self._undecided.decide()
        self._conclude()
        return result

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Upstream looks at max_steps after a step, so a run that is resumed from its last one would make another.
        last = self.state.max_steps if self.plateau is None else min(self.state.max_steps, self.plateau.ends_at)
        if self.state.global_step < last:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint, or leave what was there: a part of one, after a full disk, would be in the way of resuming."""
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        with replaced(folder) if self.args.should_save else nullcontext():
            self.accelerator.wait_for_everyone()  # or another rank writes into what is moved aside
            if self.args.should_save:
                self._save_own_state(folder)
            super()._save_checkpoint(model, trial)

    def _save_own_state(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = training_state(self.curriculum, self.args, self._total_train_tokens)
        state["progress"] = self.progress.to_dict()
        if self.plateau is not None:
            state["plateau"] = self.plateau.to_dict()
        text = json.dumps(state, indent=2)
        (folder / STATE_FILE).write_text(text + "\n", encoding="utf-8")
        if self.routing is not None:
            self.routing.save(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upstream pushes copies of the files that it knows; a config that describes a router is of no use without it."""
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if self.is_world_process_zero() and (self.args.hub_always_push or not busy):
            for name in (ROUTER_FILE, REPORT_FILE, FAMILY_FILE):
                if (file := Path(checkpoint_folder) / name).exists():
                    shutil.copy(file, Path(self.args.output_dir or ".") / name)
        super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the model, or its adapter with the description of the family that it is of; with its tokenizer, whole or not at all."""
        if not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        target = Path(output_dir or self.args.output_dir or ".")
        with replacing(target) as folder:
            if (target / "README.md").is_file():
                shutil.copyfile(target / "README.md", folder / "README.md")  # peft adds to one that is there
            super()._save(str(folder), state_dict)
            if self._adapted:
                self._elastic.elastic_config.to_json_file(folder / FAMILY_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights of a checkpoint, refusing one of another family or of another run.

        Upstream reads the file's names as they are, without an error; on disk they are the Hub's, so nothing would be loaded.
        """
        if self.routing is not None:
            self.routing.load(Path(resume_from_checkpoint))
        trained = check_family(resume_from_checkpoint, self._elastic.elastic_config)
        adapters = self.accelerator.unwrap_model(self.model) if self._adapted else None
        ours = None if adapters is None else adapters.peft_config[adapters.active_adapters[0]]
        check_adapter(resume_from_checkpoint, ours)
        self._total_train_tokens = check_training(resume_from_checkpoint, training_state(self.curriculum, self.args))
        self.progress.load(saved_progress(resume_from_checkpoint, "progress"))
        if self.plateau is not None:
            self.plateau.load(saved_progress(resume_from_checkpoint, "plateau"))
        self._elastic.elastic_config.handover_trained = trained
        if self._upstream_reads:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self._upstream_reads:
            super()._load_best_model()
        else:
            self._load_weights(self.state.best_model_checkpoint)

    @property
    def _upstream_reads(self) -> bool:
        """Whether checkpoints are adapters, or in the layouts of FSDP and DeepSpeed."""
        return self._adapted or self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _load_weights(self, folder: Any) -> None:
        saved = ElasticForCausalLM.from_pretrained(folder, dtype=self._elastic.dtype)
        self._elastic.load_state_dict(saved.state_dict())


@contextmanager
def replaced(folder: Path) -> Iterator[None]:
    """Write a checkpoint inside a `with` block. If that fails, the folder has the one that was there before, or is not there."""
    aside = folder.with_name(_ASIDE + folder.name)
    _settle(folder)
    if is_complete(folder):
        folder.rename(aside)
    else:
        _remove(folder)
    try:
        yield
    except BaseException as error:
        explained = write_error(error, folder) if isinstance(error, Exception) else None
        _remove(folder)
        if aside.exists():
            aside.rename(folder)
        if explained is not None:
            raise explained from error
        raise
    _remove(aside)


def put_back(output_dir: Path) -> None:
    """Undo what a process that was killed while it replaced a checkpoint could not undo."""
    for aside in output_dir.glob(f"{_ASIDE}checkpoint-*"):
        _settle(aside.with_name(aside.name.removeprefix(_ASIDE)))


def _settle(folder: Path) -> None:
    """Keep the new checkpoint of a number if it is whole, otherwise the one that it was to replace."""
    aside = folder.with_name(_ASIDE + folder.name)
    if is_complete(aside) and not is_complete(folder):
        _remove(folder)
        aside.rename(folder)
    else:
        _remove(aside)


def _remove(folder: Path) -> None:
    """Remove a checkpoint; from the first step on it is not a complete one any more, so that a kill leaves none with files missing."""
    (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
