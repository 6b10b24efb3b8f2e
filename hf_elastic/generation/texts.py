"""Texts and tokens that a model can read: a tokenizer has tokens for all of a text, and the model has all of the tokens."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jinja2 import TemplateError

from ..errors import TokenizerError, shown


def check_tokens(ids: Any, vocabulary: int, where: str) -> None:
    """Refuse token ids that a model has no embedding for.

    Args:
        ids (`torch.LongTensor`): Any shape; what is no tensor of whole numbers is left to others.
        vocabulary (`int`): Size of the model's.
        where (`str`): What holds them, for the error.

    Raises:
        `TokenizerError`: names the largest or a negative id.
    """
    if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.dtype == torch.bool or not ids.numel():
        return
    if ids.device.type == "meta":
        return
    least, most = (int(bound) for bound in ids.aminmax())
    if least < 0 or most >= vocabulary:
        raise TokenizerError(
            f"{where} has token {least if least < 0 else most}, and the model's vocabulary ends at {vocabulary - 1}: tokenize with the "
            "model's own tokenizer. One with tokens of its own needs model.resize_token_embeddings(len(tokenizer)) and training."
        )


def check_text(tokenizer: Any, text: str, where: str) -> None:
    """Refuse a text with characters that a tokenizer has no tokens for: it fails at them, reads "unknown", or leaves them out without a word.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        text (`str`): As a user gives it. White space and control characters are not looked at.
        where (`str`): What the text is, for the error.

    Raises:
        `TokenizerError`: names some of the characters.
    """
    if lost := _lost(tokenizer, text):
        raise _cannot_be_read(where, lost)


def chat_tokens(tokenizer: Any, messages: Any, where: str) -> list[int]:
    """Token ids of a conversation, by the tokenizer's chat template.

    Raises:
        `TokenizerError`: no template, messages of another form than it wants, or texts that the tokenizer cannot read.
    """
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise TokenizerError(f"{where}: messages={shown(messages)} must be a list of dicts with role and content.")
    if not tokenizer.chat_template:
        raise TokenizerError(f"{where} has messages, and the tokenizer has no chat template; give rows of text.")
    for message in messages:
        if isinstance(content := message.get("content"), str):
            check_text(tokenizer, content, where)
    try:
        with readable(where):
            return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
    except TemplateError as error:
        raise TokenizerError(
            f"{where}: the chat template refuses the messages: {error}. Give rows of text, or repair it"
        ) from error


@contextmanager
def readable(where: str) -> Iterator[None]:
    """Say what is wrong where a tokenizer meets a text that it cannot read inside a `with` block: it raises a bare `Exception`."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise TokenizerError(
            f"{where}: the tokenizer cannot read a text ({error}). Take out the characters that it has no tokens for, or use the tokenizer "
            "that the model was trained with."
        ) from error


def unknown_token(tokenizer: Any) -> int | None:
    """The id that stands for nothing but text that a tokenizer cannot read, if it has one; some use their end of a text for it."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    others = (getattr(tokenizer, f"{kind}_token_id", None) for kind in ("eos", "bos", "pad"))
    return None if unknown in others else unknown


def _cannot_be_read(where: str, lost: list[str]) -> TokenizerError:
    names = ", ".join(map(repr, lost[:5])) + (" and others" if len(lost) > 5 else "")
    return TokenizerError(
        f"{where}: the tokenizer has no tokens for {names}. Take it out, or use the tokenizer that the model was trained with."
    )


def _lost(tokenizer: Any, text: str) -> list[str]:
    """Parts of a text that it has no tokens for, each once."""
    spans = bool(getattr(tokenizer, "is_fast", False))
    try:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=spans)
    except Exception as error:
        if type(error) is not Exception:
            raise
        return _fails_at(tokenizer, text) or [text[:20]]
    unknown, ids = tokenizer.unk_token_id, list(encoded["input_ids"])
    if not spans:
        many = unknown is not None and ids.count(unknown) > text.count(tokenizer.unk_token)
        return (
            [c for c in _characters(text) if unknown in tokenizer(c, add_special_tokens=False)["input_ids"]]
            if many
            else []
        )
    parts, read = [], 0
    for token, (start, end) in sorted(zip(ids, encoded["offset_mapping"], strict=True), key=lambda found: found[1]):
        parts.append(text[read:start])
        if token == unknown and text[start:end] != tokenizer.unk_token:
            parts.append(text[start:end])
        read = max(read, end)
    parts.append(text[read:])
    return list(dict.fromkeys(part.strip() for part in parts if _is_visible(part)))


def _fails_at(tokenizer: Any, text: str) -> list[str]:
    def fails(character: str) -> bool:
        try:
            tokenizer(character, add_special_tokens=False)
        except Exception:
            return True
        return False

    return [character for character in _characters(text) if fails(character)]


def _characters(text: str) -> list[str]:
    return [character for character in sorted(set(text)) if _is_visible(character)]


def _is_visible(text: str) -> bool:
    return any(unicodedata.category(character)[0] not in "ZCM" for character in text)
