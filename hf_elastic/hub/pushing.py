"""`push_to_hub`: saved into a temporary folder, then published."""

from __future__ import annotations

import os
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo

from ..checkpoints.saving import Layout, check_layout
from ..errors import refuse_misspelt
from .publishing import CardArguments, full_repo_id, prepare_upload


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
        base_model: str | None = None,
        license: str | None = None,
        license_name: str | None = None,
        license_link: str | None = None,
        results: Sequence[str | os.PathLike[str]] = (),
        recipe: str | os.PathLike[str] | None = None,
        overwrite_readme: bool = False,
        **kwargs: Any,
    ) -> CommitInfo:
        """Save into a temporary folder, write a model card, and upload it all in one commit.

        Weight files of an earlier push that this one does not write, in either layout, are deleted in the same commit.

        Args:
            repo_id (`str`): Repository; it is made if it does not exist.
            layout (`str`, *optional*, defaults to `"nested"`): As in `save_pretrained`. In the nested one a size is downloaded without the rest.
            max_shard_size (`int` or `str`, *optional*): Of one file; as in `save_pretrained` if not given.
            commit_message, commit_description, private, token, revision, create_pr, tags: As in `PreTrainedModel.push_to_hub`.
            base_model, license, license_name, license_link, results, recipe:
                For the card, see [`hf_elastic.hub.cards.render_card`]; results files are uploaded to `results/`. Without `license`, that of the base
                model's card is taken.
            overwrite_readme (`bool`, *optional*, defaults to `False`):
                Replace also a `README.md` that somebody wrote. Without, only one that a push wrote is written anew.

        Returns:
            `huggingface_hub.CommitInfo`

        Raises:
            `ElasticConfigError`: an argument that does not fit, or that has no effect because the README is kept. Nothing was uploaded.
        """
        refuse_misspelt(
            kwargs, "layout", "max_shard_size", "base_model", "license", "results", "recipe", "overwrite_readme"
        )
        if kwargs:
            raise TypeError(f"unexpected argument {next(iter(kwargs))!r}.")
        check_layout(layout, {})
        repo_id = full_repo_id(repo_id, token)
        card = CardArguments(
            base_model=base_model,
            license=license,
            license_name=license_name,
            license_link=license_link,
            results=results,
            recipe=recipe,
            overwrite_readme=overwrite_readme,
        )
        tags = [*(getattr(self, "model_tags", None) or []), *(tags or [])]
        with TemporaryDirectory() as folder:
            shard = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
            self.save_pretrained(folder, layout=layout, **shard)  # type: ignore[attr-defined]
            # Nothing is made on the Hub until there is something to upload.
            upload = prepare_upload(folder, repo_id, card, tags=tags, token=token, revision=revision)
            return upload.send(
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
                commit_description=commit_description,
            )
