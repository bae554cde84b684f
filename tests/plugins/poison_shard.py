"""Shards that whoever reads them does not survive: a real crash, in whichever process reads such a row.

Loaded by sitecustomize.py in every process; it changes the reader of Parquet shards as soon as that is imported.
"""

import ctypes
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

TEXT = "poison: segfault"
TIMEOUT = "POISON_BLOCK_TIMEOUT_S"  # a variable: what a child's own timeout is from then on
READER = "mmkt_ray.samples.parquet"


class Seeping(MetaPathFinder):
    """Finds the reader, and has it crash at a batch with such a text."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == READER else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_change(module: ModuleType) -> None:
                execute(module)
                convert = module._convert
                if timeout_s := os.environ.get(TIMEOUT):
                    sys.modules["__main__"].BLOCK_TIMEOUT_S = int(timeout_s)  # type: ignore[attr-defined]

                def crash_or_convert(reading: Any, batch: Any, *rest: Any) -> Any:
                    texts = [c.cast("binary") for c in batch.columns if c.type == "string"]  # not all of them UTF-8
                    if any(TEXT.encode() in column.to_pylist() for column in texts):
                        ctypes.string_at(0)
                    return convert(reading, batch, *rest)

                module._convert = crash_or_convert

            spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


def seep_in() -> None:
    """From now on."""
    sys.meta_path.insert(0, Seeping())
