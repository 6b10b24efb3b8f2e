"""Calibration text as batches of tokens, from rows in any of the forms that data sets have."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..errors import ElasticConfigError, shown
from ..generation.texts import chat_tokens, check_text


def batches_of(
    calibration: Iterable[Mapping[str, Any]], batch_size: int, samples: int, max_length: int | None, tokenizer: Any
) -> Iterator[dict[str, torch.Tensor]]:
    """Right-padded batches with a mask, of rows in the order they come; rows without tokens (empty lines) are passed over."""
    rows: list[torch.Tensor] = []
    ids_of_rows = (
        ids
        for i, row in enumerate(_readable_rows(iter(calibration)))
        for ids in _token_ids(row, tokenizer, f"calibration row {i}")
    )
    for ids in itertools.islice(ids_of_rows, samples):
        ids = ids[:max_length]
        if not len(ids):
            continue
        rows.append(ids)
        if len(rows) == batch_size:
            yield _padded(rows)
            rows = []
    if rows:
        yield _padded(rows)


def _readable_rows(calibration: Iterator[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for i in itertools.count():
        try:
            row = next(calibration)
        except StopIteration:
            return
        except UnicodeDecodeError as error:  # files are decoded row by row
            raise ElasticConfigError(f"calibration row {i} is no UTF-8 text: {error}.") from error
        yield row


def _padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask}


def _token_ids(row: Any, tokenizer: Any, where: str) -> Iterator[torch.Tensor]:
    """The tokens of a row, or of every row of a batch.

    Args:
        where (`str`): What the row is called in errors.
    """
    if isinstance(row, torch.Tensor):
        row = {"input_ids": row}
    if not isinstance(row, Mapping):
        raise ElasticConfigError(
            f"calibration rows must be dicts, not {type(row).__name__}; give dicts with input_ids, text or messages, or token ids as a torch.Tensor."
        )
    if "input_ids" in row:
        ids = _whole_numbers(row["input_ids"], "input_ids")
        mask = row.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else torch.as_tensor(mask)
        if mask.shape != ids.shape:
            raise ElasticConfigError(
                f"{where} has input_ids of shape {tuple(ids.shape)} and an attention_mask of {tuple(mask.shape)}; they have to agree."
            )
        yield from (
            tokens[real] for tokens, real in zip(torch.atleast_2d(ids), torch.atleast_2d(mask.bool()), strict=True)
        )
    elif tokenizer is not None and "messages" in row:
        yield torch.as_tensor(chat_tokens(tokenizer, row["messages"], where))
    elif tokenizer is not None and "text" in row:
        for text in row["text"] if isinstance(row["text"], (list, tuple)) else [row["text"]]:
            if not isinstance(text, str):
                raise ElasticConfigError(f"{where}: text={shown(text)} must be a text.")
            check_text(tokenizer, text, where)
            yield _whole_numbers(tokenizer(text)["input_ids"], "text")
    else:
        raise ElasticConfigError(
            f"calibration rows have the columns {sorted(row)}; give input_ids, or text or messages together with tokenizer=."
        )


def _whole_numbers(ids: Any, column: str) -> torch.Tensor:
    try:
        tokens = torch.as_tensor(ids)
        if tokens.ndim not in (1, 2) or tokens.numel() and tokens.dtype.is_floating_point:
            raise ValueError(f"shape {tuple(tokens.shape)} of {tokens.dtype}")
    except (ValueError, TypeError, RuntimeError) as error:
        raise ElasticConfigError(
            f"the {column} of a calibration row are no token ids, one row or a batch of rows of one length ({error}); rows of different "
            "lengths in a DataLoader need a collator that pads them."
        ) from error
    return tokens.long()
