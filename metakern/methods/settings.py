"""Settings of a method by name: the defaults of its paper or code, and what a run changes."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from metakern.methods.method import Method


def parse(text: str) -> dict[str, str]:
    """Settings as in "name=value,name=value" as a mapping.

    Raises: ValueError for a word without "=" or a repeated name.
    """
    given: dict[str, str] = {}
    for word in (word.strip() for word in text.split(",") if word.strip()):
        name, sign, value = (part.strip() for part in word.partition("="))
        if not (name and sign and value):
            raise ValueError(f"--set takes NAME=VALUE,NAME=VALUE, got {word!r}")
        if name in given:
            raise ValueError(f"--set names {name!r} twice")
        given[name] = value
    return given


def require_counts(**counts: int) -> None:
    """Raises: ValueError for a count below 1."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def require_shares(**shares: float) -> None:
    """Raises: ValueError for a share outside [0, 1]."""
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be from 0 to 1, got {value}")


def shown(method: Method) -> str:
    """The settings of `method` in the form that --set takes."""
    return ",".join(f"{name}={value}" for name, value in _values(method).items())


def with_settings(method: Method, text: str) -> Method:
    """`method` with the settings that `text` gives, as in "rule=floor,weight_decay=5e-4"; the others stay.

    Raises: ValueError for a setting that the method does not have, or a value of another type.
    """
    given, values = parse(text), _values(method)
    if not given:
        return method
    for name in given:
        if name not in values:
            raise ValueError(f"--set: {method.name} has no setting {name!r}; it has {shown(method) or 'none'}")
    assert method.rebuilt is not None
    return method.rebuilt(replace(method.settings, **{name: _read(name, given[name], values[name]) for name in given}))


def settings_for(method: Method, text: str) -> str:
    """The part of `text` that `method` has settings for, in the form of `text`."""
    values = _values(method)
    return ",".join(f"{name}={value}" for name, value in parse(text).items() if name in values)


def _values(method: Method) -> dict[str, Any]:
    return {} if method.settings is None else asdict(method.settings)


def _read(name: str, word: str, like: Any) -> Any:
    """`word` as a value of the type of `like`."""
    if isinstance(like, bool):
        if word.lower() not in ("true", "false"):
            raise ValueError(f"--set {name} takes true or false, got {word!r}")
        return word.lower() == "true"
    try:
        return type(like)(word)
    except ValueError as error:
        raise ValueError(f"--set {name} takes a value like {like!r}, got {word!r}") from error
