"""How weights are stored in few bits: codes and scales, whose dimensions are those of the weight with so many of its elements to one.

```
up_proj.weight                [out, in]                    bfloat16
up_proj.weight_packed         [out, in / 2]                two codes of 4 bits in a byte
up_proj.weight_scale          [out, in / 16]               one for 16 codes
up_proj.weight_global_scale   [1]                          one for all
```

So the table of the weights is the table of these *companions*: their shapes, what a smaller size keeps of them, and which bytes that is. A cut that
does not start and end at whole blocks is refused ([`hf_elastic.architectures.axes.Dim`]); all others keep codes and scales as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .axes import Dim, TensorRule, dim

NVFP4_BLOCK = 16
"""Elements of a row that share a scale."""


@dataclass(frozen=True)
class Companion:
    """A tensor that stands, with others, for a weight.

    Args:
        suffix (`str`): What is behind the name of the module in its name on disk.
        rows (`int`): Rows of the weight to one of its; 0: one for all of them, or for each of the segments that are stored one by one.
        columns (`int`): Columns of the weight to one of its; 0: one for all of them.
        dtypes (`tuple[str, ...]`): Types in which it can be stored, by the names of safetensors; what is written first.
    """

    suffix: str
    rows: int
    columns: int
    dtypes: tuple[str, ...]

    def rule(self, rule: TensorRule) -> TensorRule:
        """It, as a rule of the table, for the weight of a rule."""
        *outer, rows, columns = rule.dims
        coded = None if rule.coded is None else _named(rule.coded, self.suffix)
        if self.rows == self.columns == 0 and coded is not None and not rule.parted:
            coded = coded.replace("{segment}", str(rows.segments[0][0]))  # one for all: that of the first
        if self.rows == 0:
            own = rows if rule.parted and len(rule.dims) - 2 == int(rule.stacked) else None
            rows = dim(1) if own is None else Dim(tuple((name, (1,)) for name, _ in own.segments))
        inner = [rows] if self.rows == self.columns == 0 else [rows, _per(columns, self.columns)]
        return replace(
            rule,
            template=_named(rule.template, self.suffix),
            disk=None if rule.disk is None else _named(rule.disk, self.suffix),
            dims=(*outer, *inner),
            dtypes=self.dtypes,
            coded=coded,
        )


def _per(along: Dim, count: int) -> Dim:
    return dim(1) if count == 0 else replace(along, per=count)


def _named(name: str, suffix: str) -> str:
    return f"{name.removesuffix('.weight')}.{suffix}"


@dataclass(frozen=True)
class Encoding:
    """A way to store a weight.

    Args:
        name (`str`): What it is called in an elastic config.
        format (`str`): `"nvfp4"` (codes E2M1 with a scale E4M3 per 16 of a row and a global one) or `"fp8"` (codes E4M3).
        companions (`tuple[Companion, ...]`): Codes first, then scales from small to large.
    """

    name: str
    format: str
    companions: tuple[Companion, ...]

    def rules(self, rule: TensorRule) -> list[TensorRule]:
        """The companions of the weight of a rule, as rules of the table."""
        return [companion.rule(rule) for companion in self.companions]


_SCALE = ("F32", "BF16", "F16")


def itemsize(name: str) -> int:
    """Bytes of an element of a type, by its name in safetensors."""
    return {"F32": 4, "BF16": 2, "F16": 2}.get(name, 1)


ENCODINGS: dict[str, Encoding] = {
    encoding.name: encoding
    for encoding in (
        Encoding(
            "nvfp4",
            "nvfp4",
            (
                Companion("weight_packed", 1, 2, ("U8",)),
                Companion("weight_scale", 1, NVFP4_BLOCK, ("F8_E4M3",)),
                Companion("weight_global_scale", 0, 0, ("F32",)),
            ),
        ),
        Encoding("fp8", "fp8", (Companion("weight", 1, 1, ("F8_E4M3",)), Companion("weight_scale", 1, 0, _SCALE))),
        Encoding(
            "fp8-tensor", "fp8", (Companion("weight", 1, 1, ("F8_E4M3",)), Companion("weight_scale", 0, 0, _SCALE))
        ),
        Encoding(
            "nvfp4-modelopt",
            "nvfp4",
            (
                Companion("weight", 1, 2, ("U8",)),
                Companion("weight_scale", 1, NVFP4_BLOCK, ("F8_E4M3",)),
                Companion("weight_scale_2", 0, 0, ("F32",)),
            ),
        ),
    )
}
"""By name. Layouts of compressed-tensors, and of modelopt where that differs: there the global scale is a factor, not a divisor, and has no dimensions.

FP8 with one scale for all is the same in both but for that, and for reading a tensor without dimensions counts as one of one element.
"""
