"""Model cards of families and of slices. Costs are counted, scores come from results files; what is not known is left out, not made up.

The words are the templates of `model_cards/`.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoints.origin import is_repo_id
from ..checkpoints.released import with_encodings
from ..configuration.section import CUT_FROM
from ..configuration_elastic import ElasticConfig
from ..errors import ElasticConfigError
from ..quantization.layouts import with_said
from .card_results import read_all
from .card_sections import (
    DOWNLOADS,
    cut_words,
    has_head,
    limits,
    load_code,
    load_code_plain,
    made,
    sizes_table,
    stored_words,
    verdict_words,
)
from .trainer_cards import run_facts

logger = logging.getLogger(__name__)

_MARKED = "<!-- Written by hf_elastic."
MARKER = f"{_MARKED} While this line is here, a push writes the file anew; remove it to keep what you change. -->"
RELATION = "finetune"
"""How the Hub relates a model to its `base_model`: `adapter`, `merge`, `quantized` or `finetune`. A family has the parent's weights sorted and, where it
was trained, changed; a slice has a part of its family's. Neither is one of the first three, and the Hub has no word for a part."""
_WRITTEN = {
    "library_name",
    "pipeline_tag",
    "base_model",
    "base_model_relation",
    "language",
    "datasets",
    "tags",
    "model_name",
}
_WRITTEN |= {"model-index", "license", "license_name", "license_link"}
"""Keys that a card is given here; others are somebody's and stay."""
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.\-]*")


def render_card(
    source: PreTrainedConfig | PreTrainedModel,
    *,
    folder: str | os.PathLike[str] | None = None,
    repo_id: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    results: Sequence[str | os.PathLike[str]] = (),
    recipe: str | os.PathLike[str] | None = None,
    tags: Iterable[str] = (),
    earlier: ModelCard | None = None,
    run: ModelCard | None = None,
) -> ModelCard:
    """The card of an elastic checkpoint, or of a plain one that was exported from one.

    Args:
        source ([`ElasticConfig`], `PreTrainedConfig` or model):
            What the card is of. A stock config has to be that of an export, which says under `cut_from` what it was cut from. What a size downloads in
            the nested layout is only known to the config that was written with it, and not to that of a model.
        folder (`str` or `os.PathLike`, *optional*):
            Where the checkpoint is. Needed for an export in few bits, of which only the headers of the files say which weights are.
        repo_id (`str`, *optional*): The repository, for the title and the code.
        base_model (`str`, *optional*): Repository of the parent, or of the family for a slice, which knows it by itself if it was cut from a repository.
        license (`str`, *optional*): The Hub's identifier, such as `apache-2.0`; with `other` also `license_name` and `license_link`.
        results (`list`, *optional*): Results files, see [`hf_elastic.hub.card_results`].
        recipe (`str` or `os.PathLike`, *optional*): Text file that says how it was made, such as a recipe of `hf-elastic train`; the card quotes it.
        tags (`list[str]`, *optional*): Besides those that the architecture gives.
        earlier (`ModelCard`, *optional*): An older card of the same model, for the base model, license, language and datasets where they are not given, and for metadata that
            somebody added.
        run (`ModelCard`, *optional*): README that a trainer of trl generated; what it says of the run is kept.

    Returns:
        `huggingface_hub.ModelCard`: Below its metadata stands a comment by which a push knows it again.

    Raises:
        `ElasticConfigError`: a plain checkpoint that is no export, an argument that does not fit, or no `folder` where it is needed.
    """
    elastic, origin = _subject(source)
    if not elastic.encodings and getattr(elastic.parent_config, "quantization_config", None) is not None:
        if folder is None:
            raise ElasticConfigError(
                "a card of an export in few bits counts what its files hold: give render_card(..., folder=) where they are."
            )
        elastic = with_encodings(folder, elastic)
    plain = not isinstance(source, ElasticConfig) and not hasattr(source, "elastic_config")
    costs = elastic.costs()
    read = read_all(results, costs)
    before: Any = earlier.data if earlier is not None else ModelCardData()
    trained: Any = run.data if run is not None else ModelCardData()
    evaluations = [evaluation for entry in read for evaluation in entry.evaluations] + (trained.eval_results or [])
    base_model = _base_model(base_model) or (origin or {}).get("family") or before.base_model or trained.base_model
    pipeline = "text-generation" if has_head(source, elastic) else None
    if before.pipeline_tag not in (None, "text-generation"):  # no card of ours says that, so somebody does
        pipeline = before.pipeline_tag
    data = ModelCardData(
        library_name=before.library_name or "transformers",
        pipeline_tag=pipeline,
        base_model=base_model,
        base_model_relation=(before.get("base_model_relation") or RELATION) if base_model else None,
        language=before.language,
        datasets=before.datasets or trained.datasets,
        tags=list(dict.fromkeys([*_tags(elastic, plain), *tags, *(trained.tags or [])])),
        eval_results=evaluations or None,
        model_name=(repo_id or elastic.parent_config.model_type).rpartition("/")[2] if evaluations else None,
        **_license(license, license_name, license_link, before),
        **{key: value for key, value in before.to_dict().items() if key not in _WRITTEN},
    )
    filled = {
        "marker": MARKER,
        "title": (repo_id or f"elastic {elastic.parent_config.model_type}").rpartition("/")[2],
        "repo_id": repo_id or "REPO",
        "model_type": f"`{elastic.parent_config.model_type}`",
        "count": len(costs),
        "auto": "AutoModelForCausalLM" if has_head(source, elastic) else "AutoModel",
        "base_model": base_model if isinstance(base_model, str) else None,
        "origin": origin,
        "cut": cut_words(origin) if origin else "",
        "needs_package": elastic.parent_config.is_heterogeneous,
        "sizes": sizes_table(elastic, costs, plain),
        "download": DOWNLOADS["nested" if "files" in elastic.elastic else "plain" if plain else "stock"],
        "stored": stored_words(elastic, plain),
        "load": load_code_plain(elastic, costs, repo_id or "REPO")
        if plain
        else load_code(elastic, costs, repo_id or "REPO", source),
        "results": "\n\n".join(text for entry in read for text in entry.tables),
        "made": made(
            source,
            elastic,
            base_model,
            origin,
            recipe,
            run_facts(run),
            None if plain else verdict_words(folder, elastic),
        ),
        "limits": limits(source, elastic, read, plain, base_model),
    }
    text = _template("slice.md" if plain else "family.md").render(filled)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def is_generated(card: ModelCard) -> bool:
    """Whether nobody took the marker out of it."""
    return _MARKED in card.text


def _template(name: str) -> jinja2.Template:
    text = resources.files("hf_elastic.model_cards").joinpath(name).read_text(encoding="utf-8")
    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    return jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False, **options).from_string(text)


# -- metadata ----------------------------------------------------------------------------------------------------------


def _subject(source: PreTrainedConfig | PreTrainedModel) -> tuple[ElasticConfig, dict[str, Any] | None]:
    """The elastic config that a card is of, and what it was cut from."""
    elastic = source if isinstance(source, ElasticConfig) else getattr(source, "elastic_config", None)
    if elastic is not None:
        return elastic, getattr(elastic, CUT_FROM, None)
    origin = getattr(source, CUT_FROM, None)
    if not isinstance(source, PreTrainedConfig) or not isinstance(origin, Mapping):
        raise ElasticConfigError(
            f"a card is of an elastic checkpoint, or of an export of one (whose config.json has `{CUT_FROM}`), and this {type(source).__name__} is of neither; "
            "hf_elastic.elastify() makes a checkpoint elastic, `hf-elastic export` writes one size of it again."
        )
    return with_said(ElasticConfig.from_parent(source, {}), source), dict(origin)


def _base_model(given: str | None) -> str | None:
    if given is not None and not (is_repo_id(given) and "/" in given):
        raise ElasticConfigError(f"base_model={given!r} must be a repository on the Hub, such as 'org/name'.")
    return given


def _license(given: str | None, name: str | None, link: str | None, before: Any) -> dict[str, Any]:
    """What was given, otherwise what an earlier card says."""
    if given is None:
        if name or link:
            raise ElasticConfigError("license_name and license_link go with license='other'.")
        given, name, link = before.license, before.license_name, before.license_link
    if given is None:
        logger.warning(
            "the card says no license: none was given, and no earlier card or card of the base model has one."
        )
        return {}
    for entry in given if isinstance(given, list) else [given]:
        if not isinstance(entry, str) or not _LICENSE.fullmatch(entry):
            raise ElasticConfigError(
                f"license={entry!r} must be an identifier of the Hub, such as 'apache-2.0': https://huggingface.co/docs/hub/repositories-licenses."
            )
    if given == "other" and not name:
        raise ElasticConfigError(
            "license='other' needs license_name, and license_link if its text is not in the repository."
        )
    if given != "other" and (name or link):
        raise ElasticConfigError(f"license_name and license_link go with license='other', not with {given!r}.")
    return {key: value for key, value in (("license", given), ("license_name", name), ("license_link", link)) if value}


def _tags(elastic: ElasticConfig, plain: bool) -> list[str]:
    architecture, config = elastic.architecture, elastic.parent_config
    parts = {part for layer in range(architecture.depth(config)) for part in architecture.parts(config, layer)}
    tags = ["hf_elastic"] if plain else ["elastic", "matryoshka", "hf_elastic"]
    tags += [elastic.parent_config.model_type]
    return tags + [tag for tag in architecture.hub_tags if tag in parts]
