"""Model cards of families and of slices. Costs are counted, scores come from results files; what is not known is left out, not made up.

The words are the templates of `model_cards/`.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel

from ._version import __version__
from .budgets import format_bytes, format_count
from .card_results import Results, read_all, table
from .configuration_elastic import ElasticConfig
from .cost import WEIGHT_DTYPES, Cost
from .errors import ElasticConfigError
from .nested import FOLDER, folder_names, levels_for
from .origin import CUT_FROM, is_repo_id, named
from .submodel import LAYERS, Submodel

logger = logging.getLogger(__name__)

_MARKED = "<!-- Written by hf_elastic."
MARKER = f"{_MARKED} While this line is here, a push writes the file anew; remove it to keep what you change. -->"
RELATION = "finetune"
"""How the Hub relates a model to its `base_model`: `adapter`, `merge`, `quantized` or `finetune`. A family has the parent's weights sorted and, where it
was trained, changed; a slice has a part of its family's. Neither is one of the first three, and the Hub has no word for a part."""
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.\-]*")


def render_card(
    source: PreTrainedConfig | PreTrainedModel,
    *,
    repo_id: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    results: Sequence[str | os.PathLike[str]] = (),
    recipe: str | os.PathLike[str] | None = None,
    tags: Iterable[str] = (),
    earlier: ModelCard | None = None,
) -> ModelCard:
    """The card of an elastic checkpoint, or of a plain one that was exported from one.

    Args:
        source ([`ElasticConfig`], `PreTrainedConfig` or model):
            What the card is of. A stock config has to be that of an export, which says under `cut_from` what it was cut from. What a size downloads in
            the nested layout is only known to the config that was written with it, and not to that of a model.
        repo_id (`str`, *optional*): The repository, for the title and the code.
        base_model (`str`, *optional*): Repository of the parent, or of the family for a slice, which knows it by itself if it was cut from a repository.
        license (`str`, *optional*): The Hub's identifier, such as `apache-2.0`; with `other` also `license_name` and `license_link`.
        results (`list`, *optional*): Results files, see [`hf_elastic.card_results`].
        recipe (`str` or `os.PathLike`, *optional*): Text file that says how it was made, such as a recipe of `hf-elastic train`; the card quotes it.
        tags (`list[str]`, *optional*): Besides those that the architecture gives.
        earlier (`ModelCard`, *optional*): An older card of the same model, for the base model, license, language and datasets where they are not given.

    Returns:
        `huggingface_hub.ModelCard`: Below its metadata stands a comment by which a push knows it again.

    Raises:
        `ElasticConfigError`: a plain checkpoint that is no export, or an argument that does not fit.
    """
    elastic, origin = _subject(source)
    plain = source is not elastic and not hasattr(source, "elastic_config")
    costs = elastic.costs()
    read = read_all(results, costs)
    evaluations = [evaluation for entry in read for evaluation in entry.evaluations]
    before: Any = earlier.data if earlier is not None else ModelCardData()
    base_model = _base_model(base_model) or (origin or {}).get("family") or before.base_model
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation" if has_head(source, elastic) else None,
        base_model=base_model,
        base_model_relation=RELATION if base_model else None,
        language=before.language,
        datasets=before.datasets,
        tags=[*_tags(elastic, plain), *tags],
        eval_results=evaluations or None,
        model_name=(repo_id or elastic.parent_config.model_type).rpartition("/")[2] if evaluations else None,
        **_license(license, license_name, license_link, before),
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
        "cut": _cut(origin) if origin else "",
        "needs_package": elastic.parent_config.is_heterogeneous,
        "sizes": _sizes(elastic, costs, plain),
        "download": _DOWNLOADS["nested" if "files" in elastic.elastic else "plain" if plain else "stock"],
        "load": _load_plain(elastic, costs, repo_id or "REPO")
        if plain
        else _load(elastic, costs, repo_id or "REPO", source),
        "results": "\n\n".join(text for entry in read for text in entry.tables),
        "made": _made(source, elastic, base_model, origin, recipe),
        "limits": _limits(elastic, read, plain, base_model),
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
            f"{type(source).__name__} is neither an elastic checkpoint's nor that of an export, whose config.json says `{CUT_FROM}`; "
            "hf_elastic.elastify() makes a checkpoint elastic, `hf-elastic export` writes one size of it again."
        )
    return ElasticConfig.from_parent(source, {}), dict(origin)


def has_head(source: PreTrainedConfig | PreTrainedModel, elastic: ElasticConfig) -> bool:
    """Whether a checkpoint is a language model and not only the base model."""
    if isinstance(source, PreTrainedModel):
        return source.can_generate()
    names = {"ElasticModel", elastic.architecture.base_class.__name__}
    return not names & set(source.architectures or ())


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
    full = elastic.architecture.full(elastic.parent_config)
    tags = ["hf_elastic"] if plain else ["elastic", "matryoshka", "hf_elastic"]
    tags += [elastic.parent_config.model_type]
    tags += ["mamba"] * ("mamba_heads" in full) + ["moe"] * ("experts" in full)
    return tags


# -- sections ----------------------------------------------------------------------------------------------------------

_DOWNLOADS = {
    "nested": "A download is the files up to that size, as `config.json` lists them; what is there already is not fetched again.",
    "stock": "A download is the bytes of the size's tensors: it fetches the rows that it needs, whole ones, so a little more.",
    "plain": "The download is the bytes of the tensors.",
}


def _sizes(elastic: ElasticConfig, costs: Mapping[str, Cost], plain: bool) -> str:
    """A row per size. Bytes of types that are the same everywhere share a column."""
    kinds: dict[tuple[int, ...], list[str]] = {}
    for name, dtype in WEIGHT_DTYPES.items():
        kinds.setdefault(tuple(cost.weight_bytes(dtype) for cost in costs.values()), []).append(name)
    head = [
        "size",
        "parameters",
        "active",
        *map(", ".join, kinds.values()),
        "download",
        "KV per token",
        "states",
        "sizes",
    ]
    rows = []
    family = elastic.family()
    whole = next(iter(family.values()))
    for i, (name, cost) in enumerate(costs.items()):
        rows.append(
            [
                "" if plain else name,
                format_count(cost.total_params),
                format_count(cost.active_params),
                *(format_bytes(sizes[i]) for sizes in kinds),
                format_bytes(download_bytes(elastic, name)),
                format_bytes(cost.kv_bytes_per_token()),
                format_bytes(cost.state_bytes()),
                _cuts(family[name], whole),
            ]
        )
    return table(head[1:], (row[1:] for row in rows)) if plain else table(head, rows)


def download_bytes(elastic: ElasticConfig, name: str) -> int:
    """Bytes that loading one size from the Hub fetches: its files in the nested layout, as far as the config lists them; else its tensors."""
    submodel = elastic.family()[name]
    if "files" in elastic.elastic:
        return sum(sum(elastic.elastic["files"][level].values()) for level in levels_for(elastic, submodel))
    return elastic.costs()[name].weight_bytes(elastic.load_dtype)


def _cuts(submodel: Submodel, whole: Submodel) -> str:
    """All sizes of the largest one, and those that a smaller one has otherwise."""
    all_sizes = whole.to_dict()
    sizes = all_sizes if submodel == whole else {k: v for k, v in submodel.to_dict().items() if all_sizes.get(k) != v}
    return ", ".join(
        f"{axis} {_short(size)}"
        for axis, size in sizes.items()
        if axis != LAYERS or size != all_sizes.get(axis) or submodel == whole
    )


def _short(size: Any) -> str:
    return "/".join("-" if entry is None else str(entry) for entry in size) if isinstance(size, list) else str(size)


def _load(elastic: ElasticConfig, costs: Mapping[str, Cost], repo: str, source: Any) -> str:
    auto = "AutoModelForCausalLM" if has_head(source, elastic) else "AutoModel"
    lines = []
    for name, cost in costs.items():
        whole = name == next(iter(costs))
        budget = "" if whole else f", budget={json.dumps(name)}"
        about = f"{format_count(cost.total_params)} parameters, {format_bytes(download_bytes(elastic, name))}"
        about = f"all sizes, switched live with model.at(...): {about}" if whole and len(costs) > 1 else about
        lines.append(f"model = {auto}.from_pretrained({json.dumps(repo)}{budget})  # {about}")
    if "files" in elastic.elastic:
        name, smallest = list(elastic.family().items())[-1]
        if not elastic.stock_config(smallest).is_heterogeneous:
            place = f"{FOLDER}/{folder_names(list(reversed(elastic.family())))[name]}"
            lines.append(
                f'model = {auto}.from_pretrained({json.dumps(repo)}, subfolder="{place}")  # {name}, without hf_elastic'
            )
    return "\n".join(lines)


def _load_plain(elastic: ElasticConfig, costs: Mapping[str, Cost], repo: str) -> str:
    about = f"{format_count(next(iter(costs.values())).total_params)} parameters"
    if elastic.parent_config.is_heterogeneous:
        facade = "ElasticForCausalLM"
        return f"from hf_elastic import {facade}  # sizes differ per layer\n\nmodel = {facade}.from_pretrained({json.dumps(repo)})  # {about}"
    auto = "AutoModelForCausalLM" if has_head(elastic.parent_config, elastic) else "AutoModel"
    return f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained({json.dumps(repo)})  # {about}"


def _cut(origin: Mapping[str, Any]) -> str:
    family = origin.get("family")
    at = f"at `{named(origin)}`"
    if family is None:
        return f"{at} from an elastic checkpoint that was not on the Hub"
    commit = f", commit `{str(origin['commit'])[:12]}`" if origin.get("commit") else ""
    return f"{at} from [{family}](https://huggingface.co/{family}){commit}"


def _made(
    source: Any,
    elastic: ElasticConfig,
    base_model: Any,
    origin: Mapping[str, Any] | None,
    recipe: str | os.PathLike[str] | None,
) -> str:
    """What the files know of it: the origin, axes, the router's targets, versions, and the recipe word for word."""
    lines = [f"- Cut {_cut(origin)}."] if origin else []
    if isinstance(base_model, str) and base_model != (origin or {}).get("family"):
        lines.append(f"- From [{base_model}](https://huggingface.co/{base_model}).")
    if elastic.axes:
        lines.append(f"- Elastic axes: {', '.join(f'`{axis}`' for axis in elastic.axes)}.")
    if router := elastic.elastic.get("router"):
        lines.append(f"- A router chose the sizes, for these targets: `{json.dumps(router['targets'])}`.")
    if elastic.interpolated:
        lines.append(
            f"- {len(elastic.interpolated)} more sizes without a name lie between the budgets; limits such as `budget=9e9` select them."
        )
    written = getattr(source, "transformers_version", None) or getattr(elastic, "transformers_version", None)
    lines.append(f"- Card by hf_elastic {__version__}{f'; config.json by transformers {written}' if written else ''}.")
    if recipe is not None:
        lines += ["", _quoted(Path(recipe))]
    return "\n".join(lines)


def _quoted(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip("\n")
    except (OSError, ValueError) as error:
        raise ElasticConfigError(f"recipe={str(path)!r} cannot be read as text: {error}") from error
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"`{path.name}`:\n\n{fence}{path.suffix.lstrip('.')}\n{text}\n{fence}"


def _limits(elastic: ElasticConfig, read: Sequence[Results], plain: bool, base_model: Any) -> str:
    lines = []
    measured = {budget for entry in read for budget in entry.budgets}
    missing = [name for name in elastic.family() if name not in measured]
    if not read:
        lines.append("- Nothing was measured here: the card gives costs, and says nothing of how good a size is.")
    elif missing and not plain:
        lines.append(f"- Not measured on their own: {', '.join(missing)}.")
    layered = [name for name, member in elastic.family().items() if elastic.stock_config(member).is_heterogeneous]
    if layered:
        which = "Its sizes" if plain else f"The sizes of {', '.join(layered)}"
        lines.append(f"- {which} differ per layer: stock classes of transformers cannot load that, hf_elastic does.")
    if not plain:
        lines.append("- Loading a size needs hf_elastic; `model.export(folder)` writes one that does not.")
    if isinstance(base_model, str):
        lines.append(
            f"- What holds for [{base_model}](https://huggingface.co/{base_model}) holds here, too: its data, its uses, its limits."
        )
    return "\n".join(lines) or "None that the files know of."
