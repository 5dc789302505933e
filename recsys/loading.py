"""Strict YAML into frozen pydantic models, with errors that name the key and suggest the nearest one."""

import copy
import difflib
import json
import re
import types
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from recsys.errors import UserError

Model = TypeVar("Model", bound=BaseModel)


class Config(BaseModel):
    """Base of every config: frozen, no unknown keys, no coercion of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ConfigError(UserError):
    """A config that cannot be used; the message names the keys and says what would do."""


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: a repeated key is an error and 1e-3 is a number (YAML 1.1 reads a string)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError(f"line {line}: the key {key!r} stands twice in one mapping; keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, origin: str) -> Any:
    """The YAML value of `text`; `origin` names its source in errors."""
    try:
        return yaml.load(text, Loader=_Loader)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from None


def load_yaml(path: Path, model: type[Model], overrides: Sequence[str] = ()) -> Model:
    """The model described by a YAML file, with `key.path=value` overrides laid over it.

    Raises ConfigError for a missing file, bad YAML, an unknown key (with the nearest valid one), a missing
    key, a wrong type or a bad value; all problems of a file are reported at once.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1, cutoff=0.5)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"there is no config file {path}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config file {path} cannot be read: {error}") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, not {_kind(values)}")
    return parse_config(apply_overrides(values, overrides), model, str(path))


def parse_config(values: dict[str, Any], model: type[Model], origin: str) -> Model:
    """The model of plain values. Types are strict, but a list may stand for a tuple and an int for a float."""
    try:
        return model.model_validate_json(json.dumps(values, default=str))  # YAML dates become ISO strings
    except ValidationError as error:
        details = error.errors(include_url=False)
        problems = dict.fromkeys(_explain(detail, model, values) for detail in details)
        raise ConfigError("\n".join([f"{origin}:", *(f"  {problem}" for problem in problems)])) from None


def dump_yaml(config: BaseModel) -> str:
    """The resolved config, every default written out, in the order of its fields."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=110)


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`values` with each `a.b=c` laid over it; `c` is read as YAML. Unknown keys are left to the validation."""
    result: dict[str, Any] = copy.deepcopy(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {override!r} must look like key.path=value, for example model.d_model=128")
        *parents, last = key.strip().split(".")
        node = result
        for depth, parent in enumerate(parents):
            child = node.setdefault(parent, {})
            if child is None:
                child = node[parent] = {}
            if not isinstance(child, dict):
                name = ".".join(parents[: depth + 1])
                raise ConfigError(f"--set {override}: {name} is {_kind(child)}, it has no key {last!r}")
            node = child
        node[last] = parse_yaml(text, f"--set {override}")
    return result


def _explain(detail: ErrorDetails, model: type[BaseModel], values: Any) -> str:
    """One problem in one line: where, what, and what would do."""
    keys, owner = _locate(detail["loc"], model, values)
    where = ".".join(keys) or "the config"
    match detail["type"]:
        case "extra_forbidden":
            valid = sorted(owner.model_fields) if owner else []
            near = difflib.get_close_matches(keys[-1], valid, n=1, cutoff=0.5)
            hint = f"did you mean {'.'.join([*keys[:-1], near[0]])}?" if near else f"valid keys: {', '.join(valid)}"
            return f"{where}: unknown key; {hint}"
        case "missing":
            return f"{where}: this key is missing"
        case "union_tag_not_found":
            field = owner.model_fields[keys[-1]] if owner else None
            valid = sorted(_alternatives(field.annotation, field.metadata)) if field else []
            return f"{where}: this part needs a key 'name' (one of {', '.join(valid)})"
        case "union_tag_invalid":
            valid = [tag.strip(" '") for tag in detail["ctx"]["expected_tags"].split(",")]
            tag = detail["ctx"]["tag"]
            near = difflib.get_close_matches(tag, valid, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}? " if near else ""
            return f"{where}.name: there is no {tag!r}; {hint}(one of {', '.join(valid)})"
    message = detail["msg"].removeprefix("Value error, ")
    given = "" if detail["type"] == "value_error" else f" (given: {json.dumps(detail['input'], default=str)})"
    return f"{where}: {message[0].lower()}{message[1:]}{given}"


def _locate(
    loc: tuple[int | str, ...], model: type[BaseModel], values: Any
) -> tuple[list[str], type[BaseModel] | None]:
    """The key path that a user wrote (pydantic puts union tags into it), and the model that owns its last key."""
    keys: list[str] = []
    owner: type[BaseModel] | None = model
    node = values
    parts = list(loc)
    while parts:
        part = parts.pop(0)
        keys.append(str(part))
        if not parts:
            break
        field = owner.model_fields.get(str(part)) if owner else None
        node = node.get(part) if isinstance(node, dict) else None
        owner = _model_of(field, node) if field else None
        if field is not None and parts[0] in _alternatives(field.annotation, field.metadata):
            parts.pop(0)
            if not parts:
                break
    return keys, owner


def _model_of(field: Any, value: Any) -> type[BaseModel] | None:
    """The model that a field's value is read by, chosen by `name` where there are several."""
    alternatives = _alternatives(field.annotation, field.metadata)
    if isinstance(value, dict) and value.get("name") in alternatives:
        return alternatives[value["name"]]
    models = list(_models(field.annotation))
    return models[0] if len(models) == 1 else None


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        for argument in get_args(annotation):
            yield from _models(argument)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation


def _alternatives(annotation: Any, metadata: Sequence[Any] = ()) -> dict[str, type[BaseModel]]:
    """`name` tag -> model of a discriminated union; empty for anything else."""
    found = {}
    for candidate in _models(annotation):
        name = candidate.model_fields.get("name")
        if name is not None and (tags := get_args(name.annotation)):
            found[str(tags[0])] = candidate
    return found


def _kind(value: Any) -> str:
    return {type(None): "empty", list: "a list", str: "a text", dict: "a mapping"}.get(
        type(value), f"the value {value!r}"
    )
