"""What a run's own state file, `<run>/run.json`, holds."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from mmkt_ray import storage
from mmkt_ray.record import Record


class Place(Record, frozen=True, strict=True):
    """Where a model lies in the run, and its features."""

    model: str
    store: str | None = None


class RunFile(Record, frozen=True, strict=True):
    """It grows from step to step; empty where there is none yet."""

    FILE: ClassVar[str] = "run.json"

    name: str = ""
    config: dict[str, Any] = Field(default_factory=dict)
    variants: dict[str, Place] = Field(default_factory=dict)
    singles: dict[str, Place] = Field(default_factory=dict)  # models of one modality alone that nobody asked for
    extracted: dict[str, str] = Field(default_factory=dict)  # digest of what decides the features -> their store
    versions: dict[str, str] = Field(default_factory=dict)
    commit: str | None = None
    hardware: str = ""
    # stage -> of the last command in which it had anything to do
    seconds: dict[str, float] = Field(default_factory=dict)

    @classmethod
    def of(cls, run_uri: str) -> RunFile:
        """That of a run folder."""
        return cls.read_or_none(storage.join(run_uri, cls.FILE)) or cls()

    def keep(self, run_uri: str) -> None:
        """Write it into a run folder."""
        self.write(storage.join(run_uri, self.FILE))
