"""Where each setting's value comes from: defaults, a preset or file, the checkpoint that is continued, the environment, the command
line; later ones win.

Knows how texts become typed values, how names are found (`section.key` or `key` alone: no two sections share a key), and keeps the
origin of every value. What the settings mean and which values are allowed stands in `config`. Imports no PyTorch.

In every source, `none` clears an optional setting, and so does -1 where it is a number: the specification's way to say "off".
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from txl_train import presets
from txl_train.config import SECTIONS, VALUE_ALIASES, RunConfig, to_dict
from txl_train.errors import ConfigError, EnvironmentUnfitError, UsageError, nearest
from txl_train.unfinished import file_beside

ENVIRONMENT_PREFIX = "TXL_"
NOT_SETTINGS = frozenset({"TXL_CACHE_DIR", "TXL_DEBUG", "TXL_SHARED_DIR"})
"""Environment variables of ours that are no settings of a run: the token cache, tracebacks, and where tests find reference data."""

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")

_OTHER_NAMES = {"warmup_step": "lr_warmup_steps"}
"""The specification's names of settings that have others here."""
_FLAGS = {
    "cuda": "train.device=cuda",
    "fp16": "train.dtype=fp16",
    "bf16": "train.dtype=bf16",
    "not_tied": "model.tie_weights=false",
    "restart": "--restart FILE",
}
"""Options that set one setting to one value, or none at all, and what to write in their place."""

_FOLDERS = ("data.data", "train.work_dir")

FIELDS: dict[str, str] = {field.name: section for section, cls in SECTIONS.items() for field in dataclasses.fields(cls)}
"""The section of every setting."""
assert len(FIELDS) == sum(len(dataclasses.fields(cls)) for cls in SECTIONS.values()), "a key must belong to one section only"


@dataclass(frozen=True)
class Setting:
    """One value as it was given, and by whom."""

    value: Any
    origin: str


@dataclass(frozen=True)
class Resolved:
    """The settings of a run and where each came from."""

    config: RunConfig
    origin: dict[str, str]
    """`section.key` -> "default", "preset tiny", "run.yaml:12", "checkpoint", "environment TXL_LR", "command line"."""
    differences: tuple[str, ...] = ()
    """A line for each setting that is not the checkpoint's, and for each that a config file would have otherwise."""

    def table(self) -> str:
        """Return the settings as text, one a line: name, value, origin."""
        rows = [(name, _show(value), self.origin[name]) for name, value in _flat(self.config)]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {origin}" for name, value, origin in rows)

    def to_dict(self) -> dict[str, Any]:
        """Return {"settings": {section: {key: value}}, "origin": {"section.key": text}} of plain values."""
        return {"settings": to_dict(self.config), "origin": dict(self.origin)}

    def to_yaml(self) -> str:
        """Return a config file that gives these settings again; the origins are comments."""
        lines = []
        for section, values in to_dict(self.config).items():
            lines.append(f"{section}:")
            lines += [f"  {key}: {_yaml_scalar(value)}  # {self.origin[f'{section}.{key}']}" for key, value in values.items()]
        return "\n".join(lines) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the settings as YAML, or as JSON if `path` ends in .json.

        Raises:
            EnvironmentUnfitError: the file cannot be written.
        """
        path = Path(path)
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n" if path.suffix == ".json" else self.to_yaml()
        try:
            with file_beside(path) as file:
                file.write(text.encode())
        except OSError as error:
            raise EnvironmentUnfitError(
                f"{path} cannot be written: {error.strerror or error}.",
                remedy="Choose another folder with `--work-dir`, or free some space.",
            ) from error


def resolve(
    config: str | None = None,
    *,
    stored: Mapping[str, Mapping[str, Any]] | None = None,
    environment: Mapping[str, str] | None = None,
    overrides: Iterable[tuple[str, Any]] = (),
    assignments: Iterable[str] = (),
) -> Resolved:
    """Merge all sources of settings; each wins over those before it.

    Args:
        config: name of a preset, or path of a YAML file with the sections model, data, optim, train.
        stored: settings {section: {key: value}} of the checkpoint that is continued. They win over `config`, which the run began from,
            for what was given on top of it then holds still.
        environment: variables TXL_<SECTION>_<FIELD> or TXL_<FIELD>; None means those of the process.
        overrides: names and values from the command line's options; a value that is text is parsed.
        assignments: `section.key=value` or `key=value`, from the command line's `--set`; they win over `overrides`.

    Raises:
        ConfigError: a key is unknown, or a value is of the wrong type or out of range; the message names key and origin.
        UsageError: the config file does not exist.
    """
    from_config = {} if config is None else _typed(_from_config(config))
    from_checkpoint = {} if stored is None else _typed(_from_sections(stored, "checkpoint"))
    given = from_config | from_checkpoint | _from_outside(environment, overrides, assignments)
    parts: dict[str, Any] = {}
    for section, cls in SECTIONS.items():
        values = {name.partition(".")[2]: setting.value for name, setting in given.items() if name.startswith(f"{section}.")}
        try:
            parts[section] = cls(**values)
        except ConfigError as error:
            raise _with_origins(error, section, given) from error
    resolved = RunConfig(**parts)
    origin = {name: given[name].origin if name in given else "default" for name, _ in _flat(resolved)}
    return Resolved(resolved, origin, _differences(given, from_checkpoint, from_config))


def look_up(
    name: str,
    config: str | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    overrides: Iterable[tuple[str, Any]] = (),
    assignments: Iterable[str] = (),
) -> Any:
    """Return the value of the one setting `section.key` as `resolve` would, without asking whether all of them fit together.

    Raises:
        ConfigError: a key is unknown, or a value is of the wrong type.
        UsageError: the config file does not exist.
    """
    given = ({} if config is None else _typed(_from_config(config))) | _from_outside(environment, overrides, assignments)
    return given[name].value if name in given else dict(_flat(RunConfig()))[name]


def find(name: str) -> str:
    """Return `section.key` for a setting's name, with or without its section, dashes or underscores.

    Raises:
        ConfigError: there is no such setting; the message names the nearest one.
    """
    wanted = name.strip().replace("-", "_")
    section, dot, key = wanted.rpartition(".")
    key = _OTHER_NAMES.get(key, key)
    wanted = f"{section}{dot}{key}"
    if key in _FLAGS:
        raise ConfigError(f"`{key}` is an option of the command line only; as a setting it is `{_FLAGS[key]}`.")
    if not dot and key in FIELDS:
        return f"{FIELDS[key]}.{key}"
    if dot and FIELDS.get(key) == section:
        return wanted
    if dot and section not in SECTIONS:
        raise ConfigError(f"`{section}` is no section of the settings: they are {', '.join(SECTIONS)}.{nearest(section, SECTIONS)}")
    if dot and key in FIELDS:
        raise ConfigError(f"`{key}` is no setting of section `{section}`. Did you mean `{FIELDS[key]}.{key}`?")
    known = [k for k, s in FIELDS.items() if not dot or s == section]
    raise ConfigError(f"`{name.strip()}` is no setting.{nearest(key, known)}", remedy="`txl train --help` lists them all.")


def parse(name: str, value: Any) -> Any:
    """Return `value`, text or a value from YAML, as the type of the setting `section.key`.

    Raises:
        ConfigError: it cannot be read as that type.
    """
    section, _, key = name.partition(".")
    kind, optional = _kind(section, key)
    if optional and (value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null"))):
        return None
    value = VALUE_ALIASES.get(name, {}).get(str(value).strip(), value)
    try:
        parsed = _parse_as(kind, value)
    except (TypeError, ValueError):
        raise ConfigError(f"`{key}` must be {describe(name)}, but is {value!r} instead.") from None
    return None if optional and kind in (int, float) and parsed == -1 else parsed


def describe(name: str) -> str:
    """Say in words what a value of the setting `section.key` looks like."""
    section, _, key = name.partition(".")
    kind, optional = _kind(section, key)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if typing.get_origin(kind) is Literal:
        text = "one of " + ", ".join(typing.get_args(kind))
    elif typing.get_origin(kind) is tuple:
        text = "a comma-separated list, each " + words[typing.get_args(kind)[0]]
    else:
        text = words[kind]
    return f"{text}, or none" if optional else text


def value_type(name: str) -> Any:
    """Return the type of the setting `section.key` without its `None`: int, float, bool, str, a Literal or a tuple."""
    section, _, key = name.partition(".")
    return _kind(section, key)[0]


def allows_none(name: str) -> bool:
    """True if the setting `section.key` may be none."""
    section, _, key = name.partition(".")
    return _kind(section, key)[1]


def _kind(section: str, key: str) -> tuple[Any, bool]:
    kind = typing.get_type_hints(SECTIONS[section])[key]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        rest = [part for part in typing.get_args(kind) if part is not type(None)]
        return rest[0], True
    return kind, False


def _parse_as(kind: Any, value: Any) -> Any:
    if typing.get_origin(kind) is Literal:
        if not isinstance(value, str):
            raise ValueError
        return value.strip()  # which of the choices it is, the config itself checks
    if typing.get_origin(kind) is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, Sequence):
            items = [items]
        if isinstance(value, str) and not value.strip():
            items = []
        return tuple(_parse_as(typing.get_args(kind)[0], item) for item in items)
    if isinstance(value, str):
        return _parse_text(kind, value.strip())
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind or (kind is float and math.isnan(value)):
        raise ValueError
    return value


def _parse_text(kind: Any, text: str) -> Any:
    if kind is bool:
        if text.lower() not in (*_TRUE, *_FALSE):
            raise ValueError
        return text.lower() in _TRUE
    if kind is float:
        number = float(text)
        if math.isnan(number):
            raise ValueError
        return number
    if kind is str and not text:
        raise ValueError
    return kind(text)


def _typed(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    typed = {}
    for name, setting in settings.items():
        try:
            typed[name] = Setting(parse(name, setting.value), setting.origin)
        except ConfigError as error:
            raise ConfigError(f"{error.message} ({setting.origin})", remedy=error.remedy) from None
    return typed


def _from_outside(
    environment: Mapping[str, str] | None, overrides: Iterable[tuple[str, Any]], assignments: Iterable[str]
) -> dict[str, Setting]:
    given = _typed(_from_environment(os.environ if environment is None else environment))
    given |= _typed({find(name): Setting(value, "command line") for name, value in overrides})
    return given | _typed(_from_assignments(assignments))


def _differences(
    given: Mapping[str, Setting], from_checkpoint: Mapping[str, Setting], from_config: Mapping[str, Setting]
) -> tuple[str, ...]:
    """Say of which settings the checkpoint and another source have different values, and which value holds."""
    lines = []
    for name, before in from_checkpoint.items():
        now, other, key = given[name], from_config.get(name), name.partition(".")[2]
        if not _same(name, now.value, before.value):
            lines.append(f"{key}: {_show(before.value)} in the checkpoint, now {_show(now.value)} ({now.origin})")
        elif now is before and other is not None and not _same(name, other.value, before.value):
            lines.append(f"{key}: {_show(before.value)} as in the checkpoint, not {_show(other.value)} ({other.origin})")
    return tuple(lines)


def _same(name: str, one: Any, other: Any) -> bool:
    """True if two values of a setting mean the same; a folder may be spelled in several ways."""
    if name in _FOLDERS and one is not None and other is not None:
        return Path(one).resolve() == Path(other).resolve()
    return bool(one == other)


def _from_sections(sections: Mapping[str, Mapping[str, Any]], origin: str) -> dict[str, Setting]:
    return {find(f"{section}.{key}"): Setting(value, origin) for section, values in sections.items() for key, value in values.items()}


def _from_config(config: str) -> dict[str, Setting]:
    if config in presets.names():
        return _from_yaml(presets.read(config), f"preset {config}", lines=False)
    path = Path(config)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = presets.names()
        looks_like_name = path.name == config and not path.suffix
        raise UsageError(
            f"There is no {'preset or config file' if looks_like_name else 'config file'} `{config}`.{nearest(config, known)}",
            remedy=f"The presets are {', '.join(known)}; anything else is the path of a YAML file.",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The config file {config} cannot be read: {error}.") from error
    return _from_yaml(text, path.name)


def _from_yaml(text: str, source: str, *, lines: bool = True) -> dict[str, Setting]:
    """Read the sections of a config file; `source` names it in origins and errors, with line numbers if `lines`."""

    def place(node: yaml.Node) -> str:
        return f"{source}:{node.start_mark.line + 1}"

    def entries(node: yaml.Node, what: str) -> list[tuple[str, yaml.Node, yaml.Node]]:
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{place(node)}: {what} must be made of `key: value` lines.")
        found: list[tuple[str, yaml.Node, yaml.Node]] = []
        for key_node, value_node in node.value:
            key = str(key_node.value)
            if key in [name for name, _, _ in found]:
                raise ConfigError(f"{place(key_node)}: `{key}` is given twice.")
            found.append((key, key_node, value_node))
        return found

    settings: dict[str, Setting] = {}
    try:
        root, values = _composed(text, source)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = source if mark is None else f"{source}:{mark.line + 1}"
        raise ConfigError(f"{where}: this is no valid YAML: {getattr(error, 'problem', None) or error}.") from error
    except (ValueError, AttributeError, KeyError, TypeError) as error:  # what PyYAML raises for impossible dates, numbers and tags
        raise ConfigError(f"{source}: this is no valid YAML: {error!r:.200}.") from error
    if root is None:
        return settings
    for section, section_key, section_node in entries(root, "a config file"):
        if section not in SECTIONS:
            hint = (
                f" Did you mean `{FIELDS[section]}.{section}`, within section `{FIELDS[section]}`?"
                if section in FIELDS
                else nearest(section, SECTIONS)
            )
            raise ConfigError(f"{place(section_key)}: `{section}` is no section of the settings: they are {', '.join(SECTIONS)}.{hint}")
        if values[section] is None:
            continue
        for key, key_node, _ in entries(section_node, f"section `{section}`"):
            try:
                name = find(f"{section}.{key}")
            except ConfigError as error:
                raise ConfigError(f"{place(key_node)}: {error.message}", remedy=error.remedy) from None
            settings[name] = Setting(values[section][key], place(key_node) if lines else source)
    return settings


class _PlainLoader(yaml.SafeLoader):
    """Reads YAML whose size is what it looks like: without aliases, nine of which can stand for gigabytes, and not nested without end."""

    source = ""
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        where = f"{self.source}:{event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{where}: a config file repeats nothing by an alias (`*{event.anchor}`).", remedy="Write the value itself.")
        if self.depth > _DEEPEST_YAML:
            raise ConfigError(f"{where}: a config file has no values more than {_DEEPEST_YAML} deep within each other.")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_DEEPEST_YAML = 20
_LARGEST_YAML = 1 << 20
"""Characters of a config file."""


def _composed(text: str, source: str) -> tuple[yaml.Node | None, Any]:
    """Return the nodes of a document, which know their lines, and its values."""
    if len(text) > _LARGEST_YAML:
        raise ConfigError(f"{source} has {len(text):,} characters, as no config file has.")
    loader = _PlainLoader(text)
    loader.source = source
    try:
        root = loader.get_single_node()
        return root, None if root is None else loader.construct_document(root)
    finally:
        loader.dispose()


def plain_yaml(text: str, source: str) -> Any:
    """Return the values of a document as small as it looks; what nests, repeats or is long beyond any config file is a ConfigError.

    Raises:
        ConfigError: it is such a document, or no valid YAML; the message begins with `source`.
    """
    try:
        return _composed(text, source)[1]
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is no valid YAML: {error!r:.200}.") from error


def _from_environment(environment: Mapping[str, str]) -> dict[str, Setting]:
    by_variable = {f"{ENVIRONMENT_PREFIX}{section}_{key}".upper(): f"{section}.{key}" for key, section in FIELDS.items()}
    short = {f"{ENVIRONMENT_PREFIX}{key}".upper(): f"{section}.{key}" for key, section in FIELDS.items()}
    settings: dict[str, Setting] = {}
    for variable, value in sorted(environment.items()):
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in NOT_SETTINGS:
            continue
        name = by_variable.get(variable) or short.get(variable)
        key = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if key in _OTHER_NAMES or key in _FLAGS:
            name = find(key)
        if name is None:
            raise ConfigError(
                f"The environment variable `{variable}` names no setting.{nearest(variable, [*short, *by_variable])}",
                remedy=f"Unset it: variables that begin with {ENVIRONMENT_PREFIX} are settings.",
            )
        if name in settings:
            other = settings[name].origin.removeprefix("environment ")
            raise ConfigError(f"The environment variables `{other}` and `{variable}` both set `{name}`.", remedy="Unset one of them.")
        settings[name] = Setting(value, f"environment {variable}")
    return settings


def _from_assignments(assignments: Iterable[str]) -> dict[str, Setting]:
    settings: dict[str, Setting] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"`{assignment}` must have the form key=value or section.key=value.")
        settings[find(name)] = Setting(value, "command line")
    return settings


def _with_origins(error: ConfigError, section: str, given: Mapping[str, Setting]) -> ConfigError:
    """Add to a config's own complaint where the values it names came from."""
    named = [name for name in dict.fromkeys(re.findall(r"`(\w+)`", error.message)) if f"{section}.{name}" in given]
    if not named:
        return error
    origins = "; ".join(f"{name}: {given[f'{section}.{name}'].origin}" for name in named)
    return ConfigError(f"{error.message} ({origins})", remedy=error.remedy)


def _flat(config: RunConfig) -> list[tuple[str, Any]]:
    return [(f"{section}.{key}", value) for section, values in to_dict(config).items() for key, value in values.items()]


def _show(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ",".join(_show(item) for item in value)
    return str(value)


def _yaml_scalar(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True).removesuffix("\n").removesuffix("\n...")
