"""Configuration files: find, read and merge them, and say what is wrong with one in a line."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

ModelT = TypeVar("ModelT", bound=BaseModel)


class ConfigError(ValueError):
    """A configuration that cannot be used: names file or flag, key, value and what is allowed."""


def _packaged_dir() -> Path:
    return Path(__file__).resolve().parent / "configs"


def packaged_configs() -> list[str]:
    """The configuration files that come with the package, as ``configs/NAME.yaml``."""
    return sorted(f"configs/{file.name}" for file in _packaged_dir().glob("*.yaml"))


def find_config(path: str | Path) -> Path:
    """The file that ``path`` means: itself, or for ``configs/NAME.yaml`` the packaged one.

    Raises:
        ConfigError: there is neither.
    """
    wanted = Path(path)
    if wanted.is_file():
        return wanted
    if wanted.parts[:1] == ("configs",) and len(wanted.parts) == 2:
        packaged = _packaged_dir() / wanted.name
        if packaged.is_file():
            return packaged
    what = "is a directory" if wanted.is_dir() else "does not exist"
    raise ConfigError(
        f"{path}: {what}; give a YAML file, or one of the packaged {', '.join(packaged_configs())}"
    )


class _Loader(yaml.SafeLoader):
    """YAML by the core schema of version 1.2, with merge keys; a key given twice is an error.

    PyYAML reads 1.1, where 010 is 8, 1:30 is 90, 1e-3 is a text, ``no`` is false and 2026-01-01 is
    a date. Here they are 10, a text, a number, a text and a text.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Checks what is written: a merged mapping may hold a key that its neighbour overrides."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Puts in what ``<<`` names: a mapping's own keys beat it, and of a list of mappings an
        earlier one beats a later one (https://yaml.org/type/merge.html)."""
        own: dict[Any, tuple[yaml.Node, yaml.Node]] = {}
        merged: dict[Any, tuple[yaml.Node, yaml.Node]] = {}
        pairs, node.value = node.value, []
        for key, value in pairs:
            if key.tag != "tag:yaml.org,2002:merge":
                own[_identity(key)] = (key, value)
                continue
            for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(part, yaml.MappingNode):
                    raise yaml.MarkedYAMLError(
                        problem="<< merges a mapping or a list of mappings, not this",
                        problem_mark=part.start_mark,
                    )
                self.flatten_mapping(part)
                for pair in part.value:
                    merged.setdefault(_identity(pair[0]), pair)
        node.value = [*(merged | own).values()]

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        text = str(self.construct_scalar(node))
        try:
            if node.tag.endswith(":float"):
                return float(re.sub(r"\.(inf|nan)$", r"\1", text.lower()))
            return int(text, 0) if text.startswith(("0o", "0x")) else int(text)
        except ValueError:
            raise yaml.MarkedYAMLError(
                problem=f"{text[:40]!r} is not a number", problem_mark=node.start_mark
            ) from None


def _identity(key: yaml.Node) -> Any:
    """The same for equal keys."""
    return (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)


_Loader.yaml_implicit_resolvers = {}  # without those of YAML 1.1
# https://yaml.org/spec/1.2.2/#1032-tag-resolution
for _kind, _pattern, _first in (
    ("null", r"null|Null|NULL|~|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
):
    _tag = f"tag:yaml.org,2002:{_kind}"
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), list(_first))
    if _kind in ("int", "float"):
        _Loader.add_constructor(_tag, _Loader.construct_number)


def read_yaml(path: str | Path) -> dict[Any, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        ConfigError: no such file, not readable, not YAML (names the line), not a mapping.
    """
    file = find_config(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
        content = yaml.load(text, Loader=_Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: is not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{path}: is not valid YAML: it is nested too deep") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold a mapping (key: value), not {_show(content)}")
    return content


def build(
    kind: type[ModelT],
    path: str | Path | None,
    values: Mapping[Any, Any],
    overrides: Mapping[str, Any],
    names: Mapping[str, str],
    kinds: Mapping[str, type[BaseModel]],
    aliases: Mapping[str, str],
) -> ModelT:
    """Validates the values of a file with the overrides on top.

    Args:
        names: how the user wrote an override, for messages.
        kinds: all kinds of files by name, to recognise a key that belongs to another kind.
        aliases: other names of keys.

    Raises:
        ConfigError: the first problem found.
    """
    from_file = _resolve_aliases(values, aliases, f"{path}: ")
    from_caller = _resolve_aliases(overrides, aliases, "")
    merged: dict[Any, Any] = {**from_file, **from_caller}
    for key, value in from_caller.items():
        below = from_file.get(key)
        if isinstance(value, Mapping) and isinstance(below, dict):
            merged[key] = {**below, **value}
    for key in merged:
        if not isinstance(key, str):
            raise ConfigError(f"{path}: {_show(key)} is not a key; keys are texts")
    try:
        return kind.model_validate(merged)
    except ValidationError as error:
        problem = error.errors()[0]
        location = [part for part in problem["loc"] if isinstance(part, str | int)]
        message = _explain(kind, problem, location, kinds, merged)
        top = str(location[0]) if location else message.split(":")[0].split(".")[0]
        if top in from_caller:
            written = {name: key for key, name in aliases.items() if key in overrides}.get(top, top)
            written = names.get(written, names.get(top, written))
            raise ConfigError(written + message[len(top) :]) from None
        if path is not None:
            written = {name: key for key, name in aliases.items() if key in values}.get(top, top)
            raise ConfigError(f"{path}: {written}{message[len(top) :]}") from None
        raise ConfigError(message) from None


def _resolve_aliases(
    values: Mapping[Any, Any], aliases: Mapping[str, str], where: str
) -> dict[Any, Any]:
    """``values`` under the keys' own names; a key under both of its names must agree."""
    resolved = dict(values)
    for alias, key in aliases.items():
        if alias in resolved:
            value = resolved.pop(alias)
            if key in resolved and resolved[key] != value:
                raise ConfigError(
                    f"{where}{alias}: {_show(value)} contradicts {key}: {_show(resolved[key])}; "
                    "they are two names of one value, give one"
                )
            resolved[key] = value
    return resolved


def _explain(
    kind: type[BaseModel],
    problem: Mapping[str, Any],
    location: list[str | int],
    kinds: Mapping[str, type[BaseModel]],
    merged: Mapping[str, Any],
) -> str:
    """``key: value is not allowed; must be ...``."""
    dotted = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        return f"{dotted}: {_unknown_key(kind, location, kinds)}"
    if problem["type"] == "value_error":  # a check across keys, which says all by itself
        own = str(problem["ctx"]["error"])
        return f"{dotted}.{own}" if dotted else own
    names = [part for part in location if isinstance(part, str)]
    field = _field(kind, names)
    allowed = describe(field.annotation, field) if field else problem["msg"]
    value = problem["input"]
    if len(names) < len(location):  # an item of a list: show the list
        value = merged
        for name in names:
            value = value[name]
    return f"{'.'.join(names)}: {_show(value)} is not allowed; must be {allowed}"


def _unknown_key(
    kind: type[BaseModel], location: list[str | int], kinds: Mapping[str, type[BaseModel]]
) -> str:
    owner: type[BaseModel] = kind
    for part in location[:-1]:
        owner = owner.model_fields[str(part)].annotation  # type: ignore[assignment]
    key = str(location[-1])
    valid = [*owner.model_fields, *getattr(owner, "aliases", {})]
    near = difflib.get_close_matches(key.lower(), valid, n=1, cutoff=0.6)
    if near:
        return f"is not a key; did you mean {near[0]!r}?"
    if owner is kind:
        for name, other in kinds.items():
            if key in other.model_fields:
                own = next(name for name, model in kinds.items() if model is kind)
                return f"is a key of {name} files; this one is read as a {own} file"
    return f"is not a key; valid keys are {', '.join(sorted(valid))}"


def _field(kind: type[BaseModel], names: list[str]) -> FieldInfo | None:
    """The field at a path of keys."""
    owner: Any = kind
    field: FieldInfo | None = None
    for name in names:
        if not (isinstance(owner, type) and issubclass(owner, BaseModel)):
            return None
        field = owner.model_fields.get(name)
        owner = field.annotation if field else None
    return field


def describe(annotation: Any, field: FieldInfo | None = None) -> str:
    """What a value may be, in words: "an integer from 0 to 64", "one of fixed, adaptive, cost"."""
    metadata = list(field.metadata) if field else []
    extra = field.json_schema_extra if field else None
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        metadata += more
    if isinstance(extra, dict) and "allowed" in extra:
        return str(extra["allowed"]) + (" or null" if _optional(annotation) else "")
    for item in metadata:
        if isinstance(item, FieldInfo):
            if isinstance(item.json_schema_extra, dict):
                return str(item.json_schema_extra["allowed"])
            metadata += item.metadata
    if _optional(annotation):
        inner = next(part for part in get_args(annotation) if part is not type(None))
        return f"{describe(inner)} or null"
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(annotation))
    if annotation is bool:
        return "true or false"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a mapping with the keys " + ", ".join(annotation.model_fields)
    if annotation in (int, float):
        noun = "an integer" if annotation is int else "a number"
        return noun + _range(metadata)
    return "a text"


def _optional(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType) and type(None) in get_args(annotation)


def _range(metadata: list[Any]) -> str:
    bounds = {
        name: getattr(item, name)
        for item in metadata
        for name in ("ge", "gt", "le", "lt")
        if getattr(item, name, None) is not None
    }
    low, high = bounds.get("ge"), bounds.get("le")
    if high == 2**31 - 1:  # "fits in 32 bits" is no news to anybody
        high = None
    if low is not None and high is not None:
        return f" from {low:g} to {high if isinstance(high, int) else f'{high:g}'}"
    if low is not None:
        return f" of at least {low:g}"
    if "gt" in bounds:
        return f" above {bounds['gt']:g}" + (f" and at most {high:g}" if high is not None else "")
    return ""


def _show(value: Any) -> str:
    """A value as it would stand in the file, shortened."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 80 else text[:77] + "..."
