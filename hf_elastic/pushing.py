"""Publishing an elastic checkpoint on the Hub."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers.utils.hub import create_and_tag_model_card, hf_api

from .errors import refuse_misspelt
from .files import INDEX_NAME, SINGLE_NAME
from .nested import FOLDER
from .router import ROUTER_FILE
from .saving import Layout, check_layout

_SHARDS = SINGLE_NAME.replace(".", "-*.")
_WEIGHTS = [
    SINGLE_NAME,
    INDEX_NAME,
    _SHARDS,
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    ROUTER_FILE,
    f"{FOLDER}/*",
]
"""What an earlier push can have left that does not belong to this one."""


class PushMixin:
    """`push_to_hub` of an elastic model."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        layout: Layout = "nested",
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = None,
        tags: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save into a temporary folder and upload it, in one commit.

        Weight files of an earlier push that this one does not write, in either layout, are deleted in the same commit.

        Args:
            repo_id (`str`): Repository; it is made if it does not exist.
            layout (`str`, *optional*, defaults to `"nested"`): As in `save_pretrained`. In the nested one a size is downloaded without the rest.
            max_shard_size (`int` or `str`, *optional*): Of one file; as in `save_pretrained` if not given.
            commit_message, commit_description, private, token, revision, create_pr, tags: As in `PreTrainedModel.push_to_hub`.

        Returns:
            `huggingface_hub.CommitInfo`
        """
        refuse_misspelt(kwargs, "layout", "max_shard_size")
        if kwargs:
            raise TypeError(f"unexpected argument {next(iter(kwargs))!r}.")
        check_layout(layout, {})
        tags = [*(getattr(self, "model_tags", None) or []), *(tags or [])]
        with TemporaryDirectory() as folder:
            shard = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
            self.save_pretrained(folder, layout=layout, **shard)  # type: ignore[attr-defined]
            api = hf_api()  # nothing is made on the Hub until there is something to upload
            repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
            create_and_tag_model_card(repo_id, tags or None, token=token).save(Path(folder, "README.md"))
            if revision is not None and not revision.startswith("refs/pr"):
                api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or "Upload model",
                commit_description=commit_description,
                token=token,
                revision=revision,
                create_pr=create_pr,
                delete_patterns=_WEIGHTS,
            )
