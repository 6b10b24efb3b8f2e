"""Publishing on the Hub: what a folder would upload, the card that goes with it, and the upload in one commit.

A `README.md` that a user wrote is kept, in the folder as in the repository; only one with the card's marker is written anew, and one that trl
generated is replaced by a card with its facts of the run.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, ModelCard, ModelCardData
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import PreTrainedConfig
from transformers.utils.hub import hf_api

from ..checkpoints.nested import FOLDER
from ..checkpoints.opening import open_checkpoint
from ..checkpoints.origin import is_repo_id
from ..checkpoints.passengers import PASSENGERS, open_passengers
from ..checkpoints.released import with_encodings
from ..configuration.parent import parent_from_dict, refuse_adapter
from ..configuration.remote_code import MODULE
from ..configuration.section import CUT_FROM
from ..configuration_elastic import ElasticConfig, read_config
from ..errors import ElasticConfigError, UnreachableError, shown
from ..routing.router import ROUTER_FILE, read_router
from ..storage.checksums import CHECKSUMS_NAME, has_checksums
from ..storage.exchanging import refuse_interrupted
from ..storage.files import INDEX_NAME, SINGLE_NAME
from ..storage.retries import passes, persistently
from ..storage.tokenizer_files import tokenizer_files
from .card_results import SEPARATOR
from .card_sections import has_head
from .cards import is_generated, render_card
from .trainer_cards import added, run_facts

README = "README.md"
_SHARDS = SINGLE_NAME.replace(".", "-*.")
_OURS = [
    SINGLE_NAME,
    INDEX_NAME,
    CHECKSUMS_NAME,
    _SHARDS,
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    ROUTER_FILE,
    PASSENGERS,
    f"{MODULE}.py",
    f"{FOLDER}/*",
]
"""What an earlier push can have left that does not belong to this one."""
_LEFT_OUT = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "checkpoint-*", ".*", "__pycache__")
"""Pickles, checkpoints of a run, hidden files: by the name of the file or of a folder above it. Links to folders are left out, too."""


@dataclass(frozen=True)
class Upload:
    """What a push uploads; nothing has been sent yet.

    Args:
        repo_id (`str`): Repository.
        files (`dict[str, Path | bytes]`): By their place in the repository.
        config (`PreTrainedConfig`): What the card is of.
        card (`ModelCard` or `None`): The README; `None` if that of the repository stays as it is.
        readme (`str`): What becomes of the README, in words.
        left_out (`tuple[str, ...]`): Files and folders that stay where they are.
    """

    repo_id: str
    files: Mapping[str, Path | bytes]
    config: PreTrainedConfig
    card: ModelCard | None
    readme: str
    left_out: tuple[str, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes per file."""
        return {
            place: len(content) if isinstance(content, bytes) else content.stat().st_size
            for place, content in self.files.items()
        }

    def send(
        self,
        *,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        commit_description: str | None = None,
    ) -> CommitInfo:
        """Make the repository and the branch if they do not exist, and upload everything in one commit."""
        api = hf_api()
        repo_id = api.create_repo(self.repo_id, private=private, token=token, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=None if create_pr else revision, token=token)
        stale = [name for name in there if name not in self.files and any(fnmatch.fnmatch(name, p) for p in _OURS)]
        added = [
            CommitOperationAdd(place, content if isinstance(content, bytes) else str(content))
            for place, content in self.files.items()
        ]
        return api.create_commit(
            repo_id,
            [*(CommitOperationDelete(name) for name in stale), *added],
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )


@dataclass(frozen=True, kw_only=True)
class CardArguments:
    """What the card is told, see [`hf_elastic.hub.cards.render_card`].

    Args:
        overwrite_readme (`bool`, *optional*, defaults to `False`): Replace a README that somebody wrote, too.
    """

    base_model: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    results: Sequence[str | os.PathLike[str]] = ()
    recipe: str | os.PathLike[str] | None = None
    overwrite_readme: bool = False

    def given(self) -> dict[str, Any]:
        """Those that are set and go into the card."""
        return {name: value for name, value in vars(self).items() if value and name != "overwrite_readme"}


def prepare_upload(
    folder: str | os.PathLike[str],
    repo_id: str,
    card: CardArguments | None = None,
    *,
    tags: Sequence[str] = (),
    token: bool | str | None = None,
    revision: str | None = None,
    offline: bool = False,
) -> Upload:
    """Check a checkpoint and everything that is said of it, and find out what a push would upload. Nothing is sent or written.

    Args:
        folder (`str` or `os.PathLike`): An elastic checkpoint in either layout, or a plain one that was exported from one.
        repo_id (`str`): Repository; asked for its README, if it exists.
        card (`CardArguments`, *optional*): What the card is told.
        tags (`list[str]`, *optional*): Further tags of the card.
        offline (`bool`, *optional*, defaults to `False`): Go on where the Hub cannot be asked for the README; for a look, not for an upload.

    Raises:
        `ElasticConfigError`: the folder holds another kind of checkpoint, a name or argument is not allowed, or would have no effect because the
            README is not to be replaced.
        `CheckpointError`: weights are missing, damaged, or disagree with the config or with their checksums, or tokenizer files are damaged.
    """
    repo_id = full_repo_id(repo_id, token)
    card = card or CardArguments()
    root = Path(folder)
    config = read_published(root)
    _check_weights(root, config)
    tokenizer_files(root, {})
    files, left_out = _listed(root)
    local = _read_card(root / README, root.name) if README in files else None
    unasked = ""
    try:
        remote = _readme_of(repo_id, revision, token)
    except (LocalEntryNotFoundError, UnreachableError):
        if not offline:
            raise
        remote, unasked = None, f" (the Hub could not be asked whether {repo_id} has one)"
    run = next((c for c in (local, remote) if run_facts(c)), None)
    kept = next((c for c in (local, remote) if c is not None and not is_generated(c) and not run_facts(c)), None)
    if kept is not None and not card.overwrite_readme:
        where = f"the {README} of {root.name if kept is local else repo_id}"
        if given := card.given():
            raise ElasticConfigError(
                f"{where} was written by somebody and is kept, so {', '.join(given)} would have no effect. Leave them out, or replace it: "
                "overwrite_readme=True (--overwrite-readme)."
            )
        new = _tagged(kept, tags)
        if new is not None:
            files[README] = str(new).encode()
        elif kept is remote:
            files.pop(README, None)
        replaced = f" and replaces that of {repo_id}" if kept is local and remote is not None else ""
        return Upload(repo_id, files, config, new, f"{where} is kept{replaced}", left_out)
    earlier = next((c for c in (local, remote) if c is not None and is_generated(c)), None)
    about = card.given()
    known = _known([card for card in (local, remote) if card and (is_generated(card) or run_facts(card))])
    _add_license(known, config, about, token, getattr(run and run.data, "base_model", None))
    rendered = render_card(config, folder=root, repo_id=repo_id, tags=tags, earlier=known, run=run, **about)
    files[README] = str(rendered).encode()
    for entry in card.results:
        path = Path(str(entry).partition(SEPARATOR)[0])
        files[f"results/{path.name}"] = path
    said = "replaced" if kept is not None else "written anew" if earlier is not None else "new"
    if run is not None:
        said += f", with what trl's of {root.name if run is local else repo_id} says of the run"
    return Upload(repo_id, files, config, rendered, f"{README} is {said}{unasked}", left_out)


def full_repo_id(repo_id: str, token: bool | str | None = None) -> str:
    """A repository with its owner, who is the user if none is given.

    Raises:
        `ElasticConfigError`: no repository can have that name.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ElasticConfigError(f"{repo_id!r} can be no repository: {error}") from error
    return repo_id if "/" in repo_id else f"{hf_api().whoami(token=token)['name']}/{repo_id}"


def read_published(folder: Path) -> PreTrainedConfig:
    """The config of what a folder publishes: an elastic one, or a stock one that says what it was cut from."""
    refuse_interrupted(folder)
    refuse_adapter(folder)
    if not (folder / "config.json").is_file():
        raise ElasticConfigError(f"{folder} is no checkpoint: it has no config.json.")
    fields, _ = ElasticConfig.get_config_dict(folder)
    if fields.get("model_type") == ElasticConfig.model_type:
        return ElasticConfig.from_pretrained(folder)
    if CUT_FROM not in fields:
        model_type = fields.get("model_type")
        if not isinstance(model_type, str):
            says = (
                "has no model_type" if model_type is None else f"says model_type={shown(model_type)}, which is no name"
            )
            raise ElasticConfigError(f"{folder} is no checkpoint that can be published: its config.json {says}.")
        raise ElasticConfigError(
            f"{folder} is a plain {model_type} checkpoint: neither elastic nor an export that says what it was cut from. "
            "hf_elastic.elastify() makes it elastic; an export of an older version has to be made again."
        )
    return parent_from_dict(fields)


def _check_weights(folder: Path, config: PreTrainedConfig) -> None:
    elastic = config if isinstance(config, ElasticConfig) else with_encodings(folder, read_config(folder, plain=True))
    head = has_head(config, elastic)
    ignored = elastic.architecture.ignored()
    full, verify = elastic.architecture.full(elastic.parent_config), has_checksums(folder)
    open_checkpoint(folder, elastic, full, head=head, ignored=ignored, verify=verify)
    open_passengers(folder, elastic, {}, verify)
    read_router(elastic, folder, verify=verify)


def _listed(folder: Path) -> tuple[dict[str, Path | bytes], tuple[str, ...]]:
    """Files by their place, and what is left out: the outermost file or folder."""
    files: dict[str, Path | bytes] = {}
    left_out: list[str] = []
    for path in sorted(folder.iterdir()):
        if any(fnmatch.fnmatch(path.name, p) for p in _LEFT_OUT) or (path.is_symlink() and path.is_dir()):
            left_out.append(path.name)
        elif path.is_dir():
            inner, left = _listed(path)
            files |= {f"{path.name}/{name}": file for name, file in inner.items()}
            left_out += [f"{path.name}/{name}" for name in left]
        else:
            files[path.name] = path
    return files, tuple(left_out)


def copy_others(source: Path, target: Path) -> None:
    """Copy what a push of `source` would upload besides the checkpoint, as far as `target` does not have it."""
    files, _ = _listed(source)
    for place in files:
        if not (target / place).exists() and not any(fnmatch.fnmatch(place, pattern) for pattern in _OURS):
            (target / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / place, target / place)


def _readme_of(repo_id: str, revision: str | None, token: bool | str | None) -> ModelCard | None:
    """The README of a repository; `None` if it has none, does not exist, or may not be seen (creating it then says so)."""
    try:
        path = persistently(lambda: hf_api().hf_hub_download(repo_id, README, revision=revision, token=token))
    except LocalEntryNotFoundError:  # the Hub could not be asked
        raise
    except RevisionNotFoundError:  # a branch that is not made yet begins with what main has
        return None if revision is None else _readme_of(repo_id, None, token)
    except (EntryNotFoundError, RepositoryNotFoundError):
        return None
    except Exception as error:
        if passes(error):
            raise UnreachableError(f"the {README} of {repo_id} could not be fetched: {error}. Try again.") from error
        raise
    return _read_card(Path(path), repo_id)


def _read_card(path: Path, where: str) -> ModelCard:
    try:
        return ModelCard.load(path, ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError) as error:
        raise ElasticConfigError(f"the metadata of the {README} of {where} cannot be read: {error}") from error


def _known(cards: Sequence[ModelCard]) -> ModelCard:
    """What generated cards say besides their text; the first that says something of a key has the word, on the license as a whole."""
    data: dict[str, Any] = {}
    for card in cards:
        said = added(card) if run_facts(card) else card.data.to_dict()
        if "license" in data:
            said = {key: value for key, value in said.items() if not key.startswith("license")}
        data = {**said, **data}
    known = ModelCard("---\n{}\n---\n")
    known.data = ModelCardData(ignore_metadata_errors=True, **data)
    return known


def _add_license(
    earlier: ModelCard,
    config: PreTrainedConfig,
    about: Mapping[str, Any],
    token: bool | str | None,
    base_model: Any = None,
) -> None:
    """Where neither the earlier card nor the arguments say a license, give it that of the base model's card."""
    data: Any = earlier.data
    origin = getattr(config, CUT_FROM, None) or {}
    base = about.get("base_model") or origin.get("family") or data.base_model or base_model
    if "license" in about or data.license or not isinstance(base, str) or not is_repo_id(base):
        return
    try:
        parent = _readme_of(base, None, token)
    except (LocalEntryNotFoundError, UnreachableError):  # the card says no license then, and a warning says so
        return
    for key in ("license", "license_name", "license_link"):
        setattr(data, key, getattr(parent.data, key) if parent is not None else None)


def _tagged(card: ModelCard, tags: Sequence[str]) -> ModelCard | None:
    """A card with these tags as well; `None` if it has them."""
    data: Any = card.data
    missing = [tag for tag in tags if tag not in (data.tags or [])]
    if not missing:
        return None
    data.tags = [*(data.tags or []), *missing]
    return card
