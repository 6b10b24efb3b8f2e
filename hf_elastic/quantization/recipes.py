"""Recipes: which weights are quantised, and to what.

```yaml
experts: nvfp4          # a kind of weights, whatever they are called in a model
mamba: nvfp4
mamba_before_attention: null          # those of the Mamba layers whose output attention reads: kept as they are
attention: fp8
"model.layers.0.*": null              # or names of weights, with `*` and `?`
```

Of what fits a weight the closest decides: its name, then patterns, then `mamba_before_attention`, then its kind. The order of the entries says nothing,
since JSON does not keep one. A weight that nothing fits is kept as it is; embeddings, head, router, convolutions, norms and parameters of
scans always are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedConfig

from ..architectures import Architecture
from ..architectures.axes import TensorRule
from ..architectures.encodings import ENCODINGS, Encoding
from ..configuration.quantized import refuse_off_blocks
from ..configuration_elastic import ElasticConfig
from ..errors import ElasticConfigError, did_you_mean, reason, shown
from ..storage.json_files import read_json

FORMATS = ("nvfp4", "fp8")
"""What weights can be quantised to: E2M1 with a scale per 16 of a row, and E4M3 with a scale per row."""

KINDS = (
    "attention",
    "linear_attention",
    "mamba",
    "short_convolution",
    "mlp",
    "experts",
    "shared_experts",
)
"""Kinds of weights (`TensorRule.kind`)."""

BEFORE_ATTENTION = "mamba_before_attention"
"""Mamba layers without attention of their own that come right before a layer with attention, leaving out layers with neither."""

Entries = Mapping[str, str | None]

_LOSSY: dict[str, str | None] = {**dict.fromkeys(KINDS, "nvfp4"), "attention": None, BEFORE_ATTENTION: None}
SHIPPED: dict[str, dict[str, str | None]] = {"nvfp4": _LOSSY, "fp8": dict.fromkeys(KINDS, "fp8")}
"""Recipes that go by the name of a format. Weights of attention, and of the Mamba layers that feed it, lose most in 4 bits and are a small part."""

_ENDINGS = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class Recipe:
    """What is quantised to what. See [`hf_elastic.quantization.recipes`].

    Args:
        entries (`dict[str, str | None]`): By kind, name or pattern the format; `None` keeps weights as they are.
        keep (`tuple[str, ...]`, *optional*): Kinds, names or patterns that are kept as they are, whatever the entries say.
        given (*optional*): What the user said, if that is shorter.
    """

    entries: Entries
    keep: tuple[str, ...] = ()
    given: str | None = None

    @classmethod
    def of(cls, recipe: Any, keep: str | Iterable[str] = ()) -> Recipe:
        """A recipe from what a user gives.

        Args:
            recipe (`str`, `os.PathLike`, `dict` or `Recipe`): The name of a format, a YAML or JSON file, or entries.
            keep (`str` or `Iterable[str]`, *optional*): What is kept as it is besides.

        Raises:
            `ElasticConfigError`: there is no such format or file, or the entries are none.
        """
        names = [keep] if isinstance(keep, str) else list(keep)
        if odd := [name for name in names if not isinstance(name, str)]:
            raise ElasticConfigError(f"keep has {shown(odd[0])}; it takes kinds, names or patterns of weights.")
        return cls._of(recipe).keeping(*names)

    @classmethod
    def _of(cls, recipe: Any) -> Recipe:
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, str) and recipe in SHIPPED:
            return cls(SHIPPED[recipe], given=recipe)
        if isinstance(recipe, (str, os.PathLike)):
            return cls(_checked(_read(recipe), f"{os.fspath(recipe)}"))
        return cls(_checked(recipe, "the recipe"))

    def keeping(self, *names: str) -> Recipe:
        """The same, but with these kinds, names or patterns kept as they are."""
        return Recipe(self.entries, (*self.keep, *names), self.given)

    def to_dict(self) -> str | dict[str, Any]:
        """As it is written into a config: the name of a format, or entries, with those that are kept."""
        if self.given is not None and not self.keep:
            return self.given
        return {**self.entries, **dict.fromkeys(self.keep)}

    def resolve(self, architecture: Architecture, config: PreTrainedConfig) -> dict[str, Encoding]:
        """What every weight that is quantised becomes.

        Args:
            architecture (`Architecture`): Table of the parent.
            config (`PreTrainedConfig`): The parent's stock config.

        Returns:
            `dict[str, Encoding]`: By the names in the live parent, in the order of the table.

        Raises:
            `ElasticConfigError`: an entry fits no weight, two patterns disagree, nothing is left to quantise, weights that others read as one matrix
                would differ, or a weight is no whole number of blocks.
        """
        weights = _weights(architecture, config)
        names = {rule.name for rule in architecture.rules(config)}
        fed = _feeding(architecture, config)
        for entry in (*self.entries, *self.keep):
            _check_entry(entry, weights, names)
        chosen = {rule.name: self._format(rule, fed) for rule in weights.values()}
        self._refuse_idle(weights, fed)
        encodings = {name: ENCODINGS[format] for name in weights if (format := chosen[name]) is not None}
        if not encodings:
            there = ", ".join(dict.fromkeys(str(rule.kind) for rule in weights.values())) or "none"
            raise ElasticConfigError(
                f"the recipe {shown(self.to_dict())} quantises nothing of this {architecture.model_type}; its weights are of the kinds: {there}."
            )
        _refuse_mixed(weights, chosen)
        with _with_way_out():
            refuse_off_blocks(architecture, config, encodings, {})
        return encodings

    def _format(self, rule: TensorRule, fed: frozenset[int]) -> str | None:
        if any(_fits(entry, rule, fed) for entry in self.keep):
            return None
        closest = _closest(self.entries, rule, fed)
        formats = {self.entries[entry] for entry in closest}
        if len(formats) > 1:
            said = " and ".join(f"{entry!r}: {self.entries[entry]}" for entry in closest)
            raise ElasticConfigError(
                f"{said} both fit {rule.name}, and disagree. Give its name to say what it shall be."
            )
        return formats.pop() if formats else None

    def _refuse_idle(self, weights: Mapping[str, TensorRule], fed: frozenset[int]) -> None:
        """Refuse a kind of which every weight is decided otherwise by patterns: who wrote it expects that it does something."""
        for kind in KINDS:
            own = [rule for rule in weights.values() if rule.kind == kind]
            if kind not in self.entries or not own:
                continue
            over = [entry for rule in own for entry in _closest(self.entries, rule, fed) if _is_pattern(entry)]
            if len(over) >= len(own) and all(self.entries[entry] != self.entries[kind] for entry in over):
                raise ElasticConfigError(
                    f"{kind!r}: {self.entries[kind]} decides nothing, as {over[0]!r}: {self.entries[over[0]]} fits all these weights and is closer. "
                    "Leave one of them out; kinds say what patterns for all would."
                )


def resolve_recipe(recipe: Any, architecture: Architecture, config: PreTrainedConfig) -> dict[str, Encoding]:
    """What every weight that a recipe quantises becomes, by its name in the live parent: [`Recipe.of`], then [`Recipe.resolve`]."""
    return Recipe.of(recipe).resolve(architecture, config)


def quantized_config(elastic: ElasticConfig, recipe: Any) -> ElasticConfig:
    """The config of a family in which what a recipe says is quantised.

    Raises:
        `ElasticConfigError`: as `Recipe.resolve`, or some size of the family, also one without a name, is cut off the blocks of a weight.
    """
    taken = Recipe.of(recipe)
    encodings = taken.resolve(elastic.architecture, elastic.parent_config)
    with _with_way_out():
        return elastic.quantized(encodings, taken.to_dict())


@contextmanager
def _with_way_out() -> Iterator[None]:
    """Add to an error about blocks what else a recipe can say."""
    try:
        yield
    except ElasticConfigError as error:
        raise ElasticConfigError(
            f"{error} Or have the recipe keep this weight as it is, or take fp8 for it, which can be cut anywhere."
        ) from error


def _read(path: str | os.PathLike[str]) -> Any:
    """What a file of a recipe holds."""
    name = os.fspath(path)
    file = Path(name)
    if not file.suffix:
        raise ElasticConfigError(
            f"{shown(name)} is no format; there are {', '.join(FORMATS)}.{did_you_mean(name, FORMATS)} Or give a file that ends with "
            f"{', '.join(_ENDINGS)}, or a dict."
        )
    if file.suffix not in _ENDINGS or not file.is_file():
        missing = "is no file" if file.suffix in _ENDINGS else f"must end with {', '.join(_ENDINGS)}"
        raise ElasticConfigError(f"the recipe {name} {missing}. Give one, or a format: {', '.join(FORMATS)}.")
    if file.suffix == ".json":
        return read_json(file)
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise ElasticConfigError(f"{name} cannot be read as YAML: {reason(error)}.") from error


def _checked(entries: Any, where: str) -> Entries:
    if not isinstance(entries, Mapping) or not entries:
        raise ElasticConfigError(
            f"{where} is {shown(entries)}; it must be a format ({', '.join(FORMATS)}), or say by kind or name of weights what they become, "
            "such as {'experts': 'nvfp4', 'attention': None}."
        )
    for entry, format in entries.items():
        if not isinstance(entry, str) or not entry.strip():
            raise ElasticConfigError(f"{where} has the entry {shown(entry)}; entries are kinds or names of weights.")
        if format is not None and format not in FORMATS:
            raise ElasticConfigError(
                f"{where} has {entry}: {shown(format)}; it must be {', '.join(FORMATS)}, or null (in Python None) to keep weights as they "
                f"are.{did_you_mean(str(format), FORMATS)}"
            )
    return dict(entries)


def _weights(architecture: Architecture, config: PreTrainedConfig) -> dict[str, TensorRule]:
    """The weights that can be quantised, by the names under which they are stored."""
    return {rule.name: rule for rule in architecture.rules(config) if rule.kind is not None and rule.copy_of is None}


def _feeding(architecture: Architecture, config: PreTrainedConfig) -> frozenset[int]:
    """The layers of `mamba_before_attention`."""
    mixers: dict[int, set[str]] = {}
    for rule in architecture.rules(config):
        if rule.kind in ("mamba", "attention") and rule.layer is not None:
            mixers.setdefault(rule.layer, set()).add(rule.kind)
    layers = sorted(mixers)
    pairs = zip(layers, layers[1:], strict=False)
    return frozenset(i for i, after in pairs if mixers[i] == {"mamba"} and "attention" in mixers[after])


def _is_pattern(entry: str) -> bool:
    return any(sign in entry for sign in "*?[")


def _fits(entry: str, rule: TensorRule, fed: frozenset[int]) -> bool:
    if entry in KINDS:
        return rule.kind == entry
    if entry == BEFORE_ATTENTION:
        return rule.kind == "mamba" and rule.layer in fed
    return fnmatchcase(rule.name, entry)


def _closest(entries: Iterable[str], rule: TensorRule, fed: frozenset[int]) -> list[str]:
    """Those of the entries that fit a weight that are closest to it."""
    ranked = [(_closeness(entry), entry) for entry in entries if _fits(entry, rule, fed)]
    most = max((rank for rank, _ in ranked), default=0)
    return [entry for rank, entry in ranked if rank == most]


def _closeness(entry: str) -> int:
    if entry in KINDS:
        return 0
    if entry == BEFORE_ATTENTION:
        return 1
    return 2 if _is_pattern(entry) else 3


def _check_entry(entry: str, weights: Mapping[str, TensorRule], names: Iterable[str]) -> None:
    """Refuse an entry that is no kind and fits no weight."""
    if entry in (*KINDS, BEFORE_ATTENTION) or any(fnmatchcase(name, entry) for name in weights):
        return
    if any(fnmatchcase(name, entry) for name in names):
        raise ElasticConfigError(
            f"the recipe names {entry!r}, which is never quantised, or stored under another name: only weights of the kinds {', '.join(KINDS)} are."
        )
    near = did_you_mean(entry, (*KINDS, BEFORE_ATTENTION)) or did_you_mean(entry, weights)
    raise ElasticConfigError(
        f"the recipe names {entry!r}, which is no kind ({', '.join((*KINDS, BEFORE_ATTENTION))}) and fits the name of no weight of this model, such as "
        f"{next(iter(weights), 'none')}.{near}"
    )


def fused_groups(rules: Iterable[TensorRule]) -> list[list[TensorRule]]:
    """Weights that other programs read as one matrix, so that they have one global scale: a list for each, of one weight for most."""
    groups: dict[object, list[TensorRule]] = {}
    for rule in rules:
        owner = rule.module.rpartition(".")[0]
        groups.setdefault(rule.name if rule.fused is None else (owner, rule.fused), []).append(rule)
    return list(groups.values())


def _refuse_mixed(weights: Mapping[str, TensorRule], chosen: Mapping[str, str | None]) -> None:
    for group in fused_groups(weights.values()):
        if len({chosen[rule.name] for rule in group}) > 1:
            said = ", ".join(f"{rule.name}: {chosen[rule.name]}" for rule in group)
            raise ElasticConfigError(
                f"other programs read these weights as one matrix ({group[0].fused}), so they have to be quantised alike: {said}."
            )
