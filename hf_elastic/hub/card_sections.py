"""What a model card says of a checkpoint, section by section, in Markdown."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .._version import __version__
from ..architectures.cost import WEIGHT_DTYPES, Cost
from ..architectures.portability import portability, words
from ..architectures.submodel import LAYERS, Submodel
from ..checkpoints.downloads import download_bytes
from ..checkpoints.nested import FOLDER, folder_names
from ..checkpoints.origin import named
from ..configuration.budgets import format_bytes, format_count
from ..configuration.leaving_out import left_out
from ..configuration.quantized import QUANTIZATION
from ..configuration_elastic import ElasticConfig
from ..errors import ElasticConfigError
from ..quantization.layouts import coded_in
from ..storage.json_files import read_json
from .card_results import Results, table

DOWNLOADS = {
    "nested": "A download is the files up to that size, as `config.json` lists them; what is there already is not fetched again.",
    "stock": "A download is at least the rows of tensors that the size keeps a part of: whole rows are fetched, so more where columns are cut.",
    "plain": "The download is the bytes of the tensors.",
}


def sizes_table(elastic: ElasticConfig, costs: Mapping[str, Cost], plain: bool) -> str:
    """A row per size. Bytes of types that are the same everywhere share a column."""
    kinds: dict[tuple[int, ...], list[str]] = {}
    for name, dtype in WEIGHT_DTYPES.items():
        kinds.setdefault(tuple(cost.weight_bytes(dtype) for cost in costs.values()), []).append(name)
    slides = any(cost.windowed for cost in costs.values())
    formats = stored_formats(elastic)
    head = [
        "size",
        "parameters",
        "active",
        *[f"stored, {' and '.join(formats)}"][: len(formats)],
        *map(", ".join, kinds.values()),
        "download",
        "KV per token",
        *["KV of full windows"][:slides],
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
                *[format_bytes(cost.stored_bytes(elastic.load_dtype))][: len(formats)],
                *(format_bytes(sizes[i]) for sizes in kinds),
                download_words(elastic, name),
                format_bytes(cost.kv_bytes_per_token()),
                *[format_bytes(cost.window_bytes())][:slides],
                format_bytes(cost.state_bytes()),
                _cuts(family[name], whole),
            ]
        )
    return table(head[1:], (row[1:] for row in rows)) if plain else table(head, rows)


def stored_formats(elastic: ElasticConfig) -> list[str]:
    """The formats in few bits that weights are stored in."""
    return list(dict.fromkeys(encoding.format for encoding in elastic.encodings.values()))


def stored_words(elastic: ElasticConfig, plain: bool) -> str:
    """What the column of stored bytes is, and how weights are held when they are loaded; empty if none are stored in few bits."""
    if not (encodings := elastic.encodings):
        return ""
    whole = elastic.architecture.full(elastic.parent_config)
    cost = elastic.cost_model()(whole)
    share, dtype = cost.coded_elements / cost.total_params, str(elastic.load_dtype).removeprefix("torch.")
    recipe = elastic.elastic[QUANTIZATION].get("recipe")
    said = f" Recipe: `{json.dumps(recipe)}`." if recipe is not None else ""
    what = f"{len(encodings)} weights, {share:.1%} of the parameters, are stored in {' and '.join(stored_formats(elastic))}, the rest in {dtype}"
    if plain:
        return f"{what}: the column *stored*. A program that decodes them holds what the columns by type say.{said}"
    return (
        f"{what}: the column *stored*. They are decoded when they are loaded, and then take what the columns by type say; with `packed=True` they stay as "
        f"they are stored.{said}"
    )


def download_words(elastic: ElasticConfig, name: str) -> str:
    """The same for readers; `≥` where only whole rows can be fetched, of which a smaller size keeps a part."""
    more = "files" not in elastic.elastic and name != next(iter(elastic.family()))
    return f"{'≥ ' * more}{format_bytes(download_bytes(elastic, elastic.family()[name]))}"


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


def load_code(elastic: ElasticConfig, costs: Mapping[str, Cost], repo: str, source: Any) -> str:
    auto = "AutoModelForCausalLM" if has_head(source, elastic) else "AutoModel"
    lines = []
    for name, cost in costs.items():
        whole = name == next(iter(costs))
        budget = "" if whole else f", budget={json.dumps(name)}"
        about = f"{format_count(cost.total_params)} parameters, {download_words(elastic, name)}"
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


def load_code_plain(elastic: ElasticConfig, costs: Mapping[str, Cost], repo: str) -> str:
    about = f"{format_count(next(iter(costs.values())).total_params)} parameters"
    if elastic.parent_config.is_heterogeneous:
        facade = "ElasticForCausalLM"
        return f"from hf_elastic import {facade}  # sizes differ per layer\n\nmodel = {facade}.from_pretrained({json.dumps(repo)})  # {about}"
    auto = "AutoModelForCausalLM" if has_head(elastic.parent_config, elastic) else "AutoModel"
    return f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained({json.dumps(repo)})  # {about}"


def cut_words(origin: Mapping[str, Any]) -> str:
    family = origin.get("family")
    at = f"at `{named(origin)}`"
    if family is None:
        return f"{at} from an elastic checkpoint that was not on the Hub"
    commit = f", commit `{str(origin['commit'])[:12]}`" if origin.get("commit") else ""
    return f"{at} from [{family}](https://huggingface.co/{family}){commit}"


VERDICT_FILE = "training_verdict.json"
"""In the folder that a run saved: its steps, and per budget how far it ended from its teacher, in numbers and in a sentence."""


def verdict_words(folder: Any, elastic: ElasticConfig) -> str | None:
    """What the run that saved a folder said of the sizes at its end, as a list below a point; `None` if it said nothing."""
    if folder is None or not (file := Path(folder) / VERDICT_FILE).is_file():
        return None
    said, family = read_json(file), elastic.family()
    entries = said.get("budgets")
    known = (
        [e for e in entries if isinstance(e, dict) and e.get("budget") in family] if isinstance(entries, list) else []
    )
    sentences = [f"  - {sentence}" for e in known if isinstance(sentence := e.get("sentence"), str)]
    return (
        "\n".join([f"- What the run said at its end, after {said.get('steps')} steps:", *sentences])
        if sentences
        else None
    )


def made(
    source: Any,
    elastic: ElasticConfig,
    base_model: Any,
    origin: Mapping[str, Any] | None,
    recipe: str | os.PathLike[str] | None,
    run: str | None = None,
    verdict: str | None = None,
) -> str:
    """What the files know of it: the origin, axes, the router's targets, the run, versions, and the recipe word for word."""
    lines = [f"- Cut {cut_words(origin)}."] if origin else []
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
    lines += [said for said in (run, verdict) if said is not None]
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


def limits(source: Any, elastic: ElasticConfig, read: Sequence[Results], plain: bool, base_model: Any) -> str:
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
    told: dict[str, list[str]] = {}
    coded = coded_in(elastic.encodings)
    for name, member in elastic.family().items():
        if name not in layered:
            found = portability(elastic.architecture, elastic.parent_config, member, elastic.load_dtype, coded)
            told.setdefault(words(found), []).append(name)
    for text, names in told.items():
        if text:
            lines.append(f"- {'In' if plain else 'Exported, ' + ', '.join(names) + ' in'} other programs: {text}.")
    if groups := left_out(source) or left_out(elastic):
        listed = ", ".join(f"`{group}`" for group in groups)
        lines.append(f"- Left out, because the stock class of transformers does not load them: {listed}.")
    if elastic.host is not None:
        kept = ", ".join(f"`{name}`" for name in elastic.host.passengers)
        lines.append(
            f"- Sizes here are the text model alone. What else the {elastic.host.model_type} has ({kept}) is kept beside it, and `model.export(folder, size)` "
            "writes both."
        )
    if not plain:
        lines.append("- Loading a size needs hf_elastic; `model.export(folder)` writes one that does not.")
    if isinstance(base_model, str):
        lines.append(
            f"- What holds for [{base_model}](https://huggingface.co/{base_model}) holds here, too: its data, its uses, its limits."
        )
    return "\n".join(lines) or "None that the files know of."


def has_head(source: PreTrainedConfig | PreTrainedModel, elastic: ElasticConfig) -> bool:
    """Whether a checkpoint is a language model and not only the base model."""
    if isinstance(source, PreTrainedModel):
        return source.can_generate()
    names = {"ElasticModel", elastic.architecture.base_class.__name__}
    return not names & set(source.architectures or ())
