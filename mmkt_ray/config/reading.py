"""YAML files, fingerprints, and the list of all keys."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mmkt_ray.config.parsing import read_yaml, sections_of, set_dotted
from mmkt_ray.config.run_config import Config, parse_config
from mmkt_ray.credentials import refuse_credentials
from mmkt_ray.errors import ConfigError, nearest
from mmkt_ray.kinds.task_kind import TaskKind
from mmkt_ray.section import Section, fingerprint

PACKAGE = Path(__file__).parents[1]
MAX_BYTES = 2_000_000  # of a config
# the project's own configs: of a wheel, of a checkout
SHIPPED = (PACKAGE / "configs", PACKAGE.parent / "jobs" / "configs")


def shipped(path: str | Path) -> Path:
    """The path itself; where nothing lies there, the project's own config that `openmoji`, `openmoji.yaml` or
    `jobs/configs/openmoji.yaml` names."""
    asked = Path(path)
    if not asked.exists() and str(asked.parent) in (".", "jobs/configs"):
        for folder in SHIPPED:
            if (file := folder / f"{asked.name.removesuffix('.yaml')}.yaml").is_file():
                return file
    return asked


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a YAML config and apply dotted overrides.

    Raises: ConfigError if the file is missing, is not YAML, or says something unknown or impossible.
    """
    try:
        with open(shipped(path), "rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode()
    except FileNotFoundError:
        known = sorted(file.stem for folder in SHIPPED for file in folder.glob("*.yaml"))
        raise ConfigError(
            f"no config at '{path}'; those that come with the project: {nearest(Path(path).stem, known)}"
        ) from None
    except (OSError, ValueError) as error:  # a folder, no permission; bytes that are no text
        raise ConfigError(f"'{path}' is no readable YAML file: {error}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"'{path}' has more than {MAX_BYTES:,} bytes, which is no config")
    raw = read_yaml(text, f"'{path}'")
    if not isinstance(raw, dict):
        found = "is empty" if raw is None else f"is a {type(raw).__name__}"
        raise ConfigError(f"'{path}' {found}: a config is a mapping of keys")
    if raw.get("training") == "auto":
        raw["training"] = {}
    for key, value in (overrides or {}).items():
        set_dotted(raw, key, value)
    refuse_credentials(raw, f"'{path}'")
    config = parse_config(raw)
    config.expand_variants()  # a wrong variant is refused now, not after an hour of extraction
    return config


def seed_32(seed: int) -> int:
    """The seed itself where it has 32 bits, which is all that scikit-learn and Optuna take;
    else its digest of 32 bits."""
    return seed if seed < 2**32 else int(fingerprint(seed, 8), 16)


def fields_of(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of the config as (dotted key, field), the keys of a section after its own."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field
        for mark, child in sections_of(field):
            yield from fields_of(child, f"{prefix}{name}{mark}.")


def default_of(field: FieldInfo) -> str:
    """The default as JSON, `required` where there is none; empty for a section, whose keys have their own."""
    if field.is_required():
        return "required"
    return "" if any(sections_of(field)) else json.dumps(_plain(field.get_default(call_default_factory=True)))


def describe_fields(section: type[Section] = Config) -> Iterator[tuple[str, str, str]]:
    """Every key of the config as (dotted key, default, description)."""
    for key, field in fields_of(section):
        yield key, default_of(field), field.description or ""


def _plain(value: Any) -> Any:
    if isinstance(value, TaskKind):
        return value.as_json()
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value
