"""Values of a row, taken out and checked: what is wrong is said by a ValueError that names the key and the value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Span = tuple[float, float]


def value_of(row: Mapping[str, Any], key: str) -> Any:
    if key not in row:
        raise ValueError(f"key '{key}' is missing; the row has {sorted(row)}")
    return row[key]


def text_of(row: Mapping[str, Any], key: str) -> str:
    value = value_of(row, key)
    if not isinstance(value, str):
        raise ValueError(f"'{key}' must be str, got {value!r}")
    return value


def whole_of(row: Mapping[str, Any], key: str) -> int:
    value = value_of(row, key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"'{key}' must be int, got {value!r}")
    return value


def identity_of(row: Mapping[str, Any], key: str) -> int | str:
    value = value_of(row, key)
    return value if isinstance(value, str) and value else whole_of(row, key)


def number_of(row: Mapping[str, Any], key: str) -> float:
    value = value_of(row, key)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"'{key}' must be float, got {value!r}")
    return float(value)


def list_of(row: Mapping[str, Any], key: str) -> list[Any]:
    value = value_of(row, key)
    if not isinstance(value, list):
        raise ValueError(f"'{key}' must be list, got {value!r}")
    return value


def span_of(row: Mapping[str, Any], key: str) -> Span:
    return pair(value_of(row, key), key)


def pair(value: Any, key: str) -> Span:
    if not isinstance(value, list) or len(value) != 2 or not all(type(time) in (int, float) for time in value):
        raise ValueError(f"'{key}' must be [start, end], got {value!r}")
    return float(value[0]), float(value[1])


def seconds(value: Any, name: str) -> float:
    """A number, or a text that is one, as tables have them."""
    try:
        if not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"'{name}' must be seconds, got {value!r}")
