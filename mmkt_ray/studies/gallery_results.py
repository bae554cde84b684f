"""What `gallery.json` holds: some samples that a model got right and wrong, with what it saw (gallery.py)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from mmkt_ray.record import IfAny, Record


class GallerySample(Record, frozen=True):
    """A sample, what the model predicts of it, and what it saw."""

    sample_id: str
    label: str  # in a multilabel task the classes, joined by commas
    pred: str
    # of the prediction; in a multilabel task of the least sure decision about a class; None of numbers
    proba: float | None
    second: IfAny[str] = None  # the next class; in a multilabel task that of the least sure decision
    second_proba: IfAny[float] = None
    # modality -> `ModalityKind.show`; None: it has none
    inputs: dict[str, dict[str, Any] | None] = Field(default_factory=dict)


class Gallery(Record, frozen=True):
    """`<model>/gallery.json`.

    Groups are `right` and `wrong`, the most confident ones (of numbers the closest predictions and those furthest
    off), and `tie`, those with the least between the two most probable classes.
    """

    split: str
    tasks: dict[str, dict[str, list[GallerySample]]]  # task -> group
    note: IfAny[str] = None  # why the samples have no inputs
