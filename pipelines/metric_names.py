"""Names and params as every MLflow server takes them.

1. Characters that a server refuses are replaced.
2. A name that is also another's folder (`loss` and `loss/policy`), or that becomes the same as another's, raises
   `ValueError` at once: the server's refusal would come long after the call.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MAX_PARAM_CHARS = 500  # what every MLflow server of the last years takes


def metric_name(name: str) -> str:
    """A name that every MLflow server takes: letters, digits, `_`, `-`, `.`, space and single inner slashes."""
    parts = (re.sub(r"[^A-Za-z0-9_.\- ]", "_", part).strip() for part in name.split("/"))
    clean = "/".join(part for part in parts if part not in ("", ".", ".."))
    if not clean:
        raise ValueError(f"metric name {name!r} holds no letter or digit; rename it")
    return clean[:250]


class MetricNames:
    """Names of one run, sanitised, refused where one is another's folder or two become one."""

    def __init__(self) -> None:
        self._clean: dict[str, str] = {}
        self._sources: dict[str, str] = {}
        self._folders: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        if name in self._clean:
            return self._clean[name]
        clean = metric_name(name)
        if clean in self._sources:
            raise ValueError(f"metrics {self._sources[clean]!r} and {name!r} are both {clean!r} in MLflow; rename one")
        parts = clean.split("/")
        folders = ["/".join(parts[:depth]) for depth in range(1, len(parts))]
        if clean in self._folders:
            raise ValueError(f"metric {name!r} is also the folder of {self._folders[clean]!r}; rename one")
        for folder in folders:
            if folder in self._sources:
                raise ValueError(f"metric {self._sources[folder]!r} is also the folder of {name!r}; rename one")
        self._sources[clean], self._clean[name] = name, clean
        for folder in folders:
            self._folders[folder] = name
        return clean


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def params(config: Mapping[str, Any]) -> dict[str, str]:
    """A resolved config as MLflow's params, by names that a server takes; values over 500 characters are cut."""
    texts = {metric_name(key): str(value) for key, value in flatten(config).items()}
    return {key: text if len(text) <= MAX_PARAM_CHARS else text[: MAX_PARAM_CHARS - 3] + "..."
            for key, text in texts.items()}
