"""Reading, overriding, saving and hashing a `Config`.

1. YAML and dotted overrides are read by OmegaConf's loader, to which `1e-4` is a number (to `yaml.safe_load`, a text),
   and merged onto the dataclasses, which gives types; a wrong key or type is re-raised as one line that names the full
   key and the nearest existing one.
2. A mapping of the user's own names (`grpo.rewards`, `sweep.space`) is replaced by what is given for it, like any other
   value; `grpo.rewards.NAME=VALUE` adds one entry, dots in its name included.
3. An override of a text is taken as it stands (`run.name=1.10`), or as YAML if it is quoted (`'data.separator="\\n"'`).
4. A hash covers named sections only, so that a cached base model is found again when unrelated keys change.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from grpo.config import Config
from grpo.files import write_text


def _all_keys() -> list[str]:
    return [f"{section}.{key}" for section, values in to_dict(Config()).items() for key in values]


def _texts() -> list[str]:
    """Keys that hold a text."""
    sections = to_dict(Config())
    return [f"{section}.{key}" for section in sections for key, value in sections[section].items()
            if isinstance(value, str)]


def _mappings() -> list[str]:
    """Keys that hold a mapping."""
    sections = to_dict(Config())
    return [f"{section}.{key}" for section in sections for key, value in sections[section].items() if value == {}]


def _path(key: str) -> list[str]:
    """The names that a dotted key goes through; below a mapping stands one name, dots and all."""
    mapping = next((mapping for mapping in _mappings() if key.startswith(f"{mapping}.")), key.partition(".")[0])
    return [*mapping.split("."), key[len(mapping) + 1 :]]


def _one_line(error: Exception, origin: str, likely: str = "") -> str:
    """The error with its key; `likely` where it names none."""
    key = (getattr(error, "full_key", None) or likely).strip()
    first = re.sub(r" \(?(of )?(type )?'?\$VALUE_TYPE'?\)?", "", str(error).splitlines()[0])
    first = re.sub(r"(Value )?'?\$VALUE'?", "an element", first)  # OmegaConf fills in what is no list's element
    entry = key.startswith(tuple(f"{mapping}{mark}" for mapping in _mappings() for mark in ".["))
    if key and not entry and key not in _all_keys() and key not in to_dict(Config()):
        near = difflib.get_close_matches(key, _all_keys() + list(to_dict(Config())), n=1, cutoff=0.5)
        return f"{origin}: unknown key {key}" + (f"; did you mean {near[0]}?" if near else "")
    return f"{origin}: {key}: {first}" if key else f"{origin}: {first}"


def load_config(
    path: str | Path | None = None, overrides: list[str] | None = None, base: Config | None = None
) -> Config:
    """Defaults (or `base`), then the YAML file, then `section.key=value` overrides.

    Raises:
        ValueError: one line naming file or override, key and remedy.
    """
    tree = OmegaConf.structured(base or Config)
    if path is not None:
        if not Path(path).is_file():
            raise ValueError(f"config file {path} does not exist; see configs/ for those that come with the project")
        values = _sections(path)
        given = [key for key in _mappings() if key.partition(".")[2] in values.get(key.partition(".")[0], {})]
        tree = _merge(_emptied(tree, given), values, f"config file {path}")
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if not equals or "." not in key:
            raise ValueError(f"override {override!r} must read section.key=value, for example grpo.group_size=16")
        *mapping, last = _path(key)
        if len(mapping) > 1:
            override = f"{'.'.join(mapping)}[{last}]{override[len(key):]}"
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        try:
            if key in _texts() and not quoted:
                values = OmegaConf.create({mapping[0]: {last: text}})
            else:
                values = OmegaConf.from_dotlist([override])
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ValueError(f"override {override!r}: {str(error).splitlines()[0]}") from None
        tree = _merge(_emptied(tree, [key] if key in _mappings() else []), values, "command line", key)
    return _built(tree, "config")


def _sections(path: str | Path) -> dict[str, Any]:
    """What a YAML file holds."""
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ValueError(f"config file {path} is not YAML: {' '.join(str(error).split())}") from None
    except OSError as error:  # it may not be read, or it is a bare number
        raise ValueError(f"config file {path} must hold sections such as `model:`: {error}") from None
    bare = [name for name in values if not isinstance(values[name], dict)] if isinstance(values, dict) else ["a list"]
    if bare:
        raise ValueError(f"config file {path} must hold sections such as `model:` with keys in them, got {bare[0]}")
    return values


def _built(tree: Any, origin: str) -> Config:
    """The dataclasses, which check their values."""
    for name, section in OmegaConf.to_container(tree).items():
        for key, value in section.items():
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, float) and not math.isfinite(number):
                    raise ValueError(f"{name}.{key} must be finite, got {number}")
    try:
        return OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise ValueError(_one_line(error, origin)) from None


def _emptied(tree: Any, keys: list[str]) -> Any:
    """A copy whose mappings at `keys` hold nothing: merging would add to them."""
    tree = copy.deepcopy(tree)
    for section, _, key in (key.partition(".") for key in keys):
        with read_write(tree[section]):
            tree[section][key] = {}
    return tree


def _merge(tree: Any, values: Any, origin: str, key: str = "") -> Any:
    try:
        return OmegaConf.merge(tree, values)
    except (OmegaConfBaseException, TypeError) as error:  # TypeError: a list for a dict, or the other way round
        raise ValueError(_one_line(error, origin, key)) from None


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dictionaries (tuples as lists), as they stand in YAML and JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: dict[str, Any], origin: str = "saved config") -> Config:
    """The inverse of `to_dict`; sections and fields that an older version did not have take their defaults.

    Raises:
        ValueError: a section or field that this version does not know; says `origin`.
    """
    return _built(_merge(OmegaConf.structured(Config), values, origin), origin)


def with_values(config: Config, values: dict[str, Any], origin: str) -> Config:
    """The config with values at dotted keys, as a sweep sets them.

    Raises:
        ValueError: an unknown key or a value that its section refuses; says `origin`.
    """
    tree = to_dict(config)
    for key, value in values.items():
        *sections, name = _path(key)
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return from_dict(tree, origin)


def value_at(config: Config, key: str) -> Any:
    """The value at a dotted key; None where a mapping does not hold it."""
    place = to_dict(config)
    for name in _path(key):
        place = place.get(name)
    return place


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal `Config`."""
    return OmegaConf.to_yaml(to_dict(config))


def save_config(config: Config, path: str | Path) -> None:
    write_text(path, to_yaml(config))


def config_hash(*parts: Any) -> str:
    """Twelve hexadecimal digits that name a set of sections or plain values, stable between processes."""
    plain = [to_dict(part) if dataclasses.is_dataclass(part) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]
