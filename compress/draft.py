"""A recipe's way from YAML to frozen dataclasses, field by field.

The text is read into a plain tree that remembers the place of every key; overrides from the command line are written
into that tree; then the tree is checked against the dataclasses. Nothing is guessed and nothing is dropped: an unknown
key, a key given twice, a stage nobody knows or a value of the wrong type is a problem, and all problems are found
before one error is raised. What a recipe holds is `compress.recipe`'s affair.

One departure from the YAML that PyYAML reads: `1e-2` is a number.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from compress.errors import RecipeError
from compress.models.selection import closest, did_you_mean

KeyPath = tuple[str | int, ...]
"""Where something is inside a recipe: `("stages", 0, "gptq", "damping")`."""


class Draft:
    """A recipe on its way to dataclasses: the plain tree, the places of its parts, and what is wrong."""

    def __init__(self, source: str, table: Mapping[str, type], root: type) -> None:
        self.source = source
        self.table = table
        self.root = root
        self.tree: Any = {}
        self.positions: dict[KeyPath, str] = {(): f"{source}:1:1"}
        self.problems: list[str] = []

    def complain(self, path: KeyPath, sentence: str) -> None:
        self.problems.append(f"{nearest(self.positions, path)}: {sentence}")

    # Text to tree

    def read(self, text: str) -> None:
        self.tree = self._load(text, (), lambda mark: f"{self.source}:{mark.line + 1}:{mark.column + 1}")

    def override(self, assignment: str) -> None:
        """Write one `path=value` of the command line into the tree."""
        label, equals, text = assignment.partition("=")
        place = f"--set {label}"
        keys = label.replace("[", ".").replace("]", "").split(".")
        if not equals or not all(keys):
            self.problems.append(f"--set {assignment}: write path=value, like calibration.samples=64.")
            return
        path = self._from_the_top(tuple(int(key) if key.isdecimal() else key for key in keys), place)
        parent = self.tree = {} if self.tree is None else self.tree
        for depth, key in enumerate(path, start=1):
            named, indexed = isinstance(parent, dict), isinstance(parent, list)
            if not (named if isinstance(key, str) else indexed and key < len(parent)):
                outer = _dotted(path[: depth - 1]) or "the recipe"
                self.problems.append(f"{place}: {outer} is {_shown(parent)}, {_dotted((key,))} is not in it.")
                return
            if depth == len(path):
                for stale in [known for known in self.positions if known[:depth] == path]:
                    del self.positions[stale]
                self.positions[path] = place
                parent[key] = self._load(text, path, lambda _: place)
            elif named and parent.get(key) is None:
                self.positions.setdefault(path[:depth], place)
                parent[key] = {}
            parent = parent[key]

    def _from_the_top(self, path: KeyPath, place: str) -> KeyPath:
        """`gptq.damping` as `stages[0].gptq.damping`, if one stage is called so; empty if that is unclear."""
        first = str(path[0])
        names = [each.name for each in settable(self.root)]
        if first in names:
            return path
        stages = self.tree.get("stages") if isinstance(self.tree, dict) else None
        found: list[KeyPath] = []
        for index, stage in enumerate(stages if isinstance(stages, list) else []):
            if isinstance(stage, dict):
                names += stage
                found += [("stages", index)] if first in stage else []
        if len(found) == 1:
            return (*found[0], *path)
        if found:
            choice = " or ".join(f"{_dotted(stage)}.{first}" for stage in found)
            self.problems.append(f"{place}: which of the stages? Write {choice}.")
        else:
            advice = did_you_mean(first, names)
            self.problems.append(f"{place}: the recipe has no field and no stage {first!r}.{advice}")
        return ()

    def _load(self, text: str, path: KeyPath, place: Callable[[yaml.Mark], str]) -> Any:
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            return None if node is None else self._plain(loader, node, path, place)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            reason = getattr(error, "problem", None) or str(error).partition("\n")[0]
            at = place(mark) if mark else nearest(self.positions, path)
            raise RecipeError([*self.problems, f"{at}: this is not YAML: {reason}."]) from error

    def _plain(self, loader: _Loader, node: yaml.Node, path: KeyPath, place: Callable[[yaml.Mark], str]) -> Any:
        """The value of a node, in dicts, lists and scalars, with the place of each of its parts recorded."""
        if isinstance(node, yaml.MappingNode):
            tree: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key, at = str(key_node.value), place(key_node.start_mark)
                inner = (*path, key)
                if key in tree:
                    first = self.positions[inner]
                    self.problems.append(f"{at}: {_dotted(inner)} is given twice, first at {first}.")
                self.positions[inner] = at
                tree[key] = self._plain(loader, value_node, inner, place)
            return tree
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.positions[*path, index] = place(item.start_mark)
            return [self._plain(loader, item, (*path, i), place) for i, item in enumerate(node.value)]
        value = loader.construct_object(node)
        is_bare_stage = isinstance(value, str) and len(path) == 2 and path[0] == "stages"
        return {value: None} if is_bare_stage else value

    # Tree to dataclasses

    def build(self, cls: type, tree: Any, path: KeyPath) -> Any:
        """The dataclass that a mapping describes; None where it has a problem."""
        label = _dotted(path) or "the recipe"
        tree = {} if tree is None else tree
        if not isinstance(tree, dict):
            self.complain(path, f"{label} must be a mapping, not {_shown(tree)}.")
            return None
        if cls is self.root:
            defaults = {"name": Path(self.source).stem, "stages": []}
            tree |= {key: value for key, value in defaults.items() if key not in tree}
        fields = {each.name: each for each in settable(cls)}
        hints = get_type_hints(cls, include_extras=True)
        num_problems = len(self.problems)
        values: dict[str, Any] = {}
        meant: set[str | None] = set()
        for key, value in tree.items():
            if key in fields:
                values[key] = self._value(hints[key], value, (*path, key))
            else:
                meant.add(closest(key, fields))
                advice = did_you_mean(key, fields) or f" It has: {', '.join(fields)}."
                self.complain((*path, key), f"{label} has no field {key!r}.{advice}")
        for name, each in fields.items():
            optional = (each.default, each.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
            if not (optional or name in values or name in meant):
                self.complain(path, f"{label} needs {name!r}.")
        if len(self.problems) > num_problems:
            return None
        try:
            return cls(**values)
        except ValueError as error:
            named = [word for word in re.findall(r"\w+", str(error)) if word in values]
            self.complain((*path, *named[:1]), f"{label}: {str(error).rstrip('.')}.")
            return None

    def _value(self, hint: Any, value: Any, path: KeyPath) -> Any:
        if path == ("stages",) and value == []:
            self.complain(path, "a recipe needs at least one stage.")
        if path[:1] == ("stages",) and len(path) == 2:
            return self._stage(value, path)
        if dataclasses.is_dataclass(hint):
            return self.build(hint, value, path)  # type: ignore[arg-type]
        if get_origin(hint) is tuple and isinstance(value, list):
            item_hint = get_args(hint)[0]
            return tuple(self._value(item_hint, item, (*path, index)) for index, item in enumerate(value))
        try:
            return TypeAdapter(hint, config=_STRICT).validate_python(value)
        except ValidationError:
            self.complain(path, f"{_dotted(path)} must be {_expectation(hint, value)}")
            return None

    def _stage(self, item: Any, path: KeyPath) -> Any:
        label = _dotted(path)
        names = list(item) if isinstance(item, dict) else [_shown(item)]
        if not isinstance(item, dict) or len(names) != 1:
            rule = "a stage is one name with its fields under it: `- gptq: {scheme: w4a16}`"
            self.complain((*path, *names[1:2]), f"{label} is {', '.join(names) or 'empty'}; {rule}.")
            return None
        name = names[0]
        if name in self.table:
            return self.build(self.table[name], item[name], (*path, name))
        advice = did_you_mean(name, self.table) + f" There are: {', '.join(self.table)}."
        self.complain((*path, name), f"{label} is {name!r}, which is no stage.{advice}")
        return None


class _Loader(yaml.SafeLoader):
    """Reads `1e-2` as the number it is."""


class Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would read as a number."""


_EXPONENT_WITHOUT_POINT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
for _each in (_Loader, Dumper):
    _each.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT_WITHOUT_POINT, list("-+0123456789"))

_STRICT = ConfigDict(strict=True, allow_inf_nan=False)


def settable(cls: type) -> list[dataclasses.Field[Any]]:
    """The fields a recipe may give: those that count when two instances are compared."""
    return [each for each in dataclasses.fields(cls) if each.init and each.compare]


def nearest(positions: Mapping[KeyPath, str], path: KeyPath) -> str:
    """The place of `path`, or of the innermost known part around it."""
    known = (path[:length] for length in range(len(path), -1, -1) if path[:length] in positions)
    return next((positions[part] for part in known), "")


def _dotted(path: KeyPath) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


def _expectation(hint: Any, value: Any) -> str:
    """`a whole number of at least 1 or null, not 'x'.`, with advice where the intention shows."""
    *others, last = _allowed(hint)
    advice = ""
    if isinstance(value, str):
        advice = did_you_mean(value, [each[1:-1] for each in (*others, last) if each.startswith("'")])
        if get_origin(hint) is tuple:
            advice = f" Write [{value}]."
    return (f"{', '.join(others)} or " if others else "") + f"{last}, not {_shown(value)}.{advice}"


def _allowed(hint: Any) -> Iterator[str]:
    """What a value of this type may be, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for each in arguments:
            yield from _allowed(each)
    elif origin is Annotated:
        described = [each.description for each in arguments[1:] if getattr(each, "description", None)]
        yield from described or _allowed(arguments[0])
    elif origin is Literal:
        yield from map(repr, arguments)
    elif hint is bool:
        yield from ("true", "false")
    else:
        words = {int: "a whole number", float: "a number", str: "text", NoneType: "null", tuple: "a list"}
        yield words.get(origin or hint, str(hint))


def _shown(value: Any) -> str:
    """A value as its author would write it."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else repr(value)
