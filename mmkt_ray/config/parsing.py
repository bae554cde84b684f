"""A raw mapping -> a checked section: dotted overrides, and error messages that name the nearest known key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import date
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from mmkt_ray.credentials import holds_secret
from mmkt_ray.errors import ConfigError, nearest
from mmkt_ray.section import OneOf, Section

SectionT = TypeVar("SectionT", bound=Section)
MAX_VALUES, MAX_DEPTH = 100_000, 50  # of a config
MERGE = "tag:yaml.org,2002:merge"
TYPED = {"bool": "yes or no", "int": "number", "float": "number", "date": "date", "datetime": "time"}
WANTED = {
    **dict.fromkeys(("model_type", "dict_type", "model_attributes_type"), "a mapping of keys"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
}
SHOWN = 80  # characters of a value that messages show


def parse(section: type[SectionT], raw: Mapping[str, Any]) -> SectionT:
    """Check a raw mapping. Raises: ConfigError with one line per fault."""
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        faults: list[dict[str, Any]] = [dict(e) for e in error.errors()]
        places = [fault["loc"] for fault in faults]
        own = [
            f for f in faults if f["type"] != "too_short" or not any(_is_inside(place, f["loc"]) for place in places)
        ]
        raise ConfigError("\n".join(_explain(fault, section) for fault in own)) from None


def _is_inside(place: tuple[Any, ...], of: tuple[Any, ...]) -> bool:
    """Whether a fault's place is inside another: pydantic counts a list without its faulty items."""
    return len(place) > len(of) and place[: len(of)] == of


class Loader(yaml.SafeLoader):
    """Safe YAML in which every key is text as it is written (`no`, `1`, `2024-11-29`) and stands once in its mapping.

    It stops at MAX_DEPTH: PyYAML's time grows with the square of the depth, and its recursion ends in a traceback.
    """

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        """See PyYAML: `[` or `{`."""
        self._check_depth(self.flow_level)
        super().fetch_flow_collection_start(token)

    def add_indent(self, column: int) -> bool:
        """See PyYAML: deeper lines, or `- - -`."""
        self._check_depth(len(self.indents))
        return bool(super().add_indent(column))

    def _check_depth(self, depth: int) -> None:
        if depth >= MAX_DEPTH:
            raise yaml.scanner.ScannerError(None, None, "it is nested too deeply", self.get_mark())

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See PyYAML. Values that `<<` merges in may be replaced, as YAML has it."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
                key.tag = "tag:yaml.org,2002:str"
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is there twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """See PyYAML, but for `010`, which is 8 to it, and `1:30`, which is 90."""
        self._check_base(node)
        return super().construct_yaml_int(node)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        """See PyYAML, but for `1:30.5`."""
        self._check_base(node)
        return super().construct_yaml_float(node)

    def _check_base(self, node: yaml.ScalarNode) -> None:
        if ":" in node.value or re.fullmatch(r"[-+]?0[0-9_]+", node.value):
            why = (
                f"YAML takes '{node.value}' for a number of base {60 if ':' in node.value else 8}: write it in base "
                "10"
            )
            raise yaml.constructor.ConstructorError(None, None, f"{why}, or put the text in quotes", node.start_mark)


for kind in ("int", "float"):
    Loader.add_constructor(f"tag:yaml.org,2002:{kind}", getattr(Loader, f"construct_yaml_{kind}"))


def read_yaml(text: str, what: str) -> Any:
    """The value of a YAML text. what: where it comes from. Raises: ConfigError."""
    try:
        loader = Loader(text)
        try:
            value = loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of 5,000 digits, a 30th of February
        place = getattr(error, "problem_mark", None)
        hidden = f"see line {place.line + 1 if place else 1}; it is not shown, as there is a secret in the text"
        raise ConfigError(f"{what} is not valid YAML: {hidden if holds_secret(text) else error}") from None
    except (AttributeError, LookupError, TypeError):  # how PyYAML fails at `!!bool x`, `!!map [1]`, `!!timestamp x`
        raise ConfigError(f"{what} is not valid YAML: a value is not of the type that its tag (!!..) names") from None
    check_extent(value, what)
    return value


def check_extent(value: Any, what: str) -> None:
    """Raises: ConfigError for a value that aliases (`*x`) blow up, or that holds itself."""
    left, count = [(value, 0)], 0
    while left:
        inner, depth = left.pop()
        count += 1
        if count > MAX_VALUES or depth > MAX_DEPTH:
            raise ConfigError(f"{what} has more than {MAX_VALUES:,} values, or more than {MAX_DEPTH} levels")
        if isinstance(inner, dict):
            left += [(child, depth + 1) for child in inner.values()]
        elif isinstance(inner, list):
            left += [(child, depth + 1) for child in inner]


def parse_override(text: str) -> tuple[str, Any]:
    """Split `a.b=c` into a dotted key and a YAML value. Raises: ConfigError."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set takes key=value, got '{text}'; e.g. --set training.epochs=5")
    return key.strip(), read_yaml(value, f"--set {key.strip()}={shortened(value)}")


def set_dotted(raw: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `a.b` of nested mappings and lists in place, making what is absent.
    Raises: ConfigError if a part holds none."""
    *parents, last = dotted.split(".")
    node: Any = raw
    for part in parents:
        child = _child(node, part, dotted)
        if child is None or isinstance(child, str):  # absent, or a bare name that now gets options
            child = {} if child is None else {"name": child}
            _assign(node, part, child)
        node = child
    _child(node, last, dotted)
    _assign(node, last, value)


def _child(node: Any, part: str, dotted: str) -> Any:
    if isinstance(node, dict):
        return node.get(part)
    if isinstance(node, list) and part.isascii() and part.isdigit() and len(part) < 7 and int(part) < len(node):
        return node[int(part)]
    raise ConfigError(f"cannot set '{dotted}': '{part}' is not inside a mapping or list here")


def _assign(node: Any, part: str, value: Any) -> None:
    node[int(part) if isinstance(node, list) else part] = value


def sections_of(field: FieldInfo) -> Iterator[tuple[str, type[Section]]]:
    """The sections inside a field, with the mark of its key:
    `[]` in lists, `.<name>` in mappings, `(cnn)` of a choice."""
    choices = [mark for mark in field.metadata if isinstance(mark, OneOf)]
    yield from sections(choices[0] if choices else field.annotation)


def sections(annotation: Any, mark: str = "") -> Iterator[tuple[str, type[Section]]]:
    """The same of a field's type."""
    if isinstance(annotation, OneOf):
        for name, section in annotation.sections():
            yield mark + (f"({name})" if name else ""), section
        return
    if isinstance(annotation, type) and issubclass(annotation, Section):
        field = annotation.model_fields.get("name")
        chosen = get_args(field.annotation) if field is not None else ()
        yield mark + (f"({chosen[0]})" if len(chosen) == 1 else ""), annotation
        return
    origin = get_origin(annotation)
    inner = "[]" if origin is tuple else ".<name>" if origin is dict else ""
    parts = get_args(annotation)
    choices = [part for part in parts if isinstance(part, OneOf)]  # of an Annotated, whose type is their base
    for part in choices or parts:
        yield from sections(part, mark + inner)


def _explain(error: dict[str, Any], root: type[Section]) -> str:
    """One line for one pydantic error: where, what, and for an unknown key the nearest known one."""
    where = ".".join(shortened(str(p)) for p in error["loc"] if p != "[key]")  # pydantic's mark of a mapping's key
    if error["type"] == "extra_forbidden":
        *parents, key = error["loc"]
        return f"unknown key '{where}': {nearest(str(key), _known_keys(parents, root))}"
    if error["type"] == "missing":
        return f"'{where}' is missing"
    if error["type"] == "union_tag_invalid":
        return f"{where}: unknown name '{error['ctx']['tag']}': known: {error['ctx']['expected_tags']}"
    got = error.get("input")
    if wanted := WANTED.get(error["type"]):
        return f"{where}: must be {wanted}, got {shortened(repr(got))}"
    shown = f" (got {shortened(repr(got))})" if isinstance(got, str | int | float | bool | date | None) else ""
    if error["type"] == "string_type" and isinstance(got, int | float | date):
        shown += f": YAML takes it for a {TYPED[type(got).__name__]}; put the text in quotes"
    return (
        f"{where}: {error['msg'].removeprefix('Value error, ')}{shown}"
        if where
        else error["msg"].removeprefix("Value error, ")
    )


def shortened(text: str) -> str:
    """At most SHOWN characters of it."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _known_keys(parents: list[Any], root: type[Section]) -> list[str]:
    """The fields of the section found by walking `parents` (which may hold list indices, mapping keys and union
    tags)."""
    candidates: list[type[Section]] = [root]
    for part in parents:
        fields = [c.model_fields[part] for c in candidates if isinstance(part, str) and part in c.model_fields]
        if fields:
            candidates = [s for f in fields for _, s in sections_of(f)]
        else:  # an index, a mapping's key or a union's tag: narrow by tag where it is one
            candidates = [c for c in candidates if _tag(c) == part] or candidates
    return sorted({name for c in candidates for name in c.model_fields})


def _tag(section: type[Section]) -> str | None:
    name = section.model_fields.get("name")
    values = get_args(name.annotation) if name is not None else ()
    return values[0] if len(values) == 1 else None
