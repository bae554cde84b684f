"""A kind of task that the project does not have: a class and an entry.

A process that unpickles a config which uses it imports this module, which makes the entry there too.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from mmkt_ray.kinds.arrow import Converted
from mmkt_ray.kinds.multiclass import Multiclass
from mmkt_ray.kinds.tasks import TASK_KINDS


@dataclass(frozen=True)
class Initial(Multiclass):
    """Classes are told apart by the first letters of their names."""

    name: ClassVar[str] = "initial"
    letters: int = 1

    def from_arrow(self, raw: pa.Array, class_names: list[str] | None, separator: str) -> Converted:
        column, errors = super().from_arrow(raw, class_names, separator)
        return pc.utf8_upper(pc.utf8_slice_codeunits(column, 0, self.letters)), errors

    def tell(self, cell: Any, separator: str = ", ") -> str:
        return f"{cell}.."


TASK_KINDS["initial"] = Initial
