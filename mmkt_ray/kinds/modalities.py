"""The kinds of modality that there are: a new one is a class, see modality_kind.py, and an entry here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmkt_ray.kinds.file_kinds import Audio, Image
from mmkt_ray.kinds.modality_kind import ModalityKind
from mmkt_ray.kinds.value_kinds import Table, Text, Vector

if TYPE_CHECKING:

    pass


MODALITY_KINDS: dict[str, type[ModalityKind]] = {
    "image": Image,
    "text": Text,
    "audio": Audio,
    "table": Table,
    "vector": Vector,
}
