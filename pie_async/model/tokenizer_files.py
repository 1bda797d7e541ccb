"""What the files of a Hugging Face model directory say about its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer as Backend

from pie_async.config import MIB
from pie_async.errors import ModelError
from pie_async.model.config_fields import MOST_JSON_BYTES, check_size
from pie_async.model.confined_template import ConfinedTemplate

_MOST_TOKENIZER_BYTES = 256 * MIB
"""The largest in use have 40 MiB."""


def read_backend(path: Path) -> Backend:
    if not path.is_file():
        raise ModelError(
            f"{path} is missing; a model needs it (a tokenizer.model alone can be converted "
            "with transformers' AutoTokenizer and save_pretrained)"
        )
    check_size(path, _MOST_TOKENIZER_BYTES)
    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        raise ModelError(f"{path} is damaged or of an unknown kind: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; {} if there is no such file."""
    if not path.is_file():
        return {}
    check_size(path, MOST_JSON_BYTES)
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {error}") from error


def special_token_names(*sources: dict[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` and so on, from the first source that has them."""
    names: dict[str, str] = {}
    for source in sources:
        for name, token in source.items():
            text = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(text, str):
                names.setdefault(name, text)
    return names


def read_eos_ids(path: Path, backend: Backend, names: Mapping[str, str]) -> tuple[int, ...]:
    ids: list[int] = []
    for file in ("generation_config.json", "config.json"):
        found = read_json(path / file).get("eos_token_id")
        listed = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(token) is int and token >= 0 for token in listed):
            raise ModelError(f"eos_token_id in {path / file} must be token ids, not {found!r}")
        ids += listed
        if ids:
            break
    if (token := backend.token_to_id(names.get("eos_token", ""))) is not None:
        ids.append(token)
    return tuple(dict.fromkeys(ids))


def _text(path: Path) -> str:
    check_size(path, MOST_JSON_BYTES)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise ModelError(f"{path} cannot be read: {reason}") from error


def read_chat_template(
    path: Path, config: Mapping[str, Any], names: Mapping[str, str]
) -> ConfinedTemplate | None:
    """From chat_template.jinja, chat_template.json or tokenizer_config.json, in this order."""
    source: Any
    if (file := path / "chat_template.jinja").is_file():
        source = _text(file)
    elif (file := path / "chat_template.json").is_file():
        source = read_json(file).get("chat_template")
    else:
        file = path / "tokenizer_config.json"
        source = config.get("chat_template")
    if isinstance(source, list):
        try:
            named = {str(entry["name"]): entry["template"] for entry in source}
        except (TypeError, KeyError) as error:
            raise ModelError(f"{file} lists chat templates without names or texts") from error
        source = named.get("default", next(iter(named.values()), None))
    if source is None:
        return None
    if not isinstance(source, str):
        raise ModelError(f"the chat template in {file} must be text")
    return ConfinedTemplate(source, names, path=file)
