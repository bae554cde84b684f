"""A request's body -> rows as `Model.predict` takes them, and its answer as JSON-able values.

JSON: {"rows": [{modality: value, ..}, ..]}, or one such row by itself. An image or a sound is a file in base64, also
as a `data:` URI; all other values stand as they are; null and what is left out are absent. Multipart: one row, a
field for each modality, files as uploads.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmkt_ray.errors import DataError, nearest
from mmkt_ray.kinds.modality_kind import ModalityKind

if TYPE_CHECKING:
    from mmkt_ray.api.model import Model

MAX_ROWS = 256  # of a request
RequestRow = dict[str, Any]


def rows_from_json(body: bytes, modalities: Mapping[str, ModalityKind]) -> list[RequestRow]:
    """The rows of a JSON body; modalities: name -> kind. Raises: DataError that says what is wrong with it."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the body is no JSON ({error})") from None
    rows = asked["rows"] if isinstance(asked, dict) and isinstance(asked.get("rows"), list) else [asked]
    if not 0 < len(rows) <= MAX_ROWS:
        raise DataError(f"a request has 1 to {MAX_ROWS} rows, this one has {len(rows)}: send several requests")
    return [_row(row, i, modalities) for i, row in enumerate(rows)]


def _row(given: Any, number: int, modalities: Mapping[str, ModalityKind]) -> RequestRow:
    if not isinstance(given, dict):
        raise DataError(f"row {number} must be an object with a value for each of {sorted(modalities)}")
    if unknown := sorted(given.keys() - modalities.keys()):
        raise DataError(f"row {number}: the model reads no '{unknown[0]}': {nearest(unknown[0], modalities)}")
    return {m: _value(given.get(m), number, m, kind) for m, kind in modalities.items()}


def _value(value: Any, number: int, modality: str, kind: ModalityKind) -> Any:
    if value is None or not kind.is_file:
        return value
    if not isinstance(value, str):
        raise DataError(f"row {number}: {modality} must be a file in base64, got {type(value).__name__}")
    try:
        # `base64` of the command line breaks lines
        return base64.b64decode(
            "".join((value.partition(",")[2] if value.startswith("data:") else value).split()), validate=True
        )
    except ValueError as error:  # also signs that are not ASCII
        raise DataError(f"row {number}: {modality} is no base64 ({error})") from None


def row_from_form(parts: Sequence[tuple[str, Any]], modalities: Mapping[str, ModalityKind]) -> RequestRow:
    """The row of a multipart form whose uploads were read as bytes. An empty field is an absent modality.
    Raises: DataError."""
    fields = dict(parts)
    if len(fields) < len(parts):
        twice = next(name for name, _ in parts if [own for own, _ in parts].count(name) > 1)
        raise DataError(f"the form has '{twice}' twice: a form is one row, send several as JSON")
    if unknown := sorted(fields.keys() - modalities.keys()):
        raise DataError(f"the model reads no '{unknown[0]}': {nearest(unknown[0], modalities)}")
    row: RequestRow = {}
    for m, kind in modalities.items():
        value = fields.get(m)
        if isinstance(value, bytes) and not kind.is_file:
            value = value.decode("utf-8", "replace")
        if isinstance(value, str) and kind.is_file and value:
            raise DataError(f"'{m}' must be an uploaded file, got text")
        row[m] = value or None
    if all(value is None for value in row.values()):
        raise DataError(f"the form is broken or empty: give a field for at least one of {sorted(modalities)}")
    return row


def answer(model: Model, rows: Sequence[RequestRow], top: int) -> list[dict[str, Any]]:
    """Per row {task: {prediction, and of classes top: [{class, probability}]}, missing, unreadable};
    top: how many classes."""
    predicted = model.predict_arrow(list(rows), read_files=False).to_pylist()
    return [
        {
            "predictions": {t: _prediction(row, t, model.classes.get(t, []), top) for t in model.tasks},
            "missing": row["missing"],
            "unreadable": row["unreadable"],
        }
        for row in predicted
    ]


def _prediction(row: Mapping[str, Any], task: str, names: Sequence[str], top: int) -> dict[str, Any]:
    found: dict[str, Any] = {"prediction": finite(row[f"{task}_pred"])}
    proba = row.get(f"{task}_proba")
    if proba is not None and len(proba) == len(names):
        order = sorted(range(len(names)), key=lambda i: -proba[i])[:top]
        found["top"] = [{"class": names[i], "probability": round(proba[i], 6)} for i in order]
    return found


def finite(value: Any) -> Any:
    """The value; None for a number that JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def request_schema(modalities: Mapping[str, ModalityKind]) -> dict[str, Any]:
    """The request's body in the words of OpenAPI."""
    fields = {m: _field(kind, encoded=True) for m, kind in modalities.items()}
    row = {"type": "object", "properties": fields, "additionalProperties": False}
    rows = {
        "type": "object",
        "required": ["rows"],
        "properties": {"rows": {"type": "array", "maxItems": MAX_ROWS, "items": row}},
    }
    form = {"type": "object", "properties": {m: _field(kind, encoded=False) for m, kind in modalities.items()}}
    content = {"application/json": {"schema": {"anyOf": [rows, row]}}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}


def _field(kind: ModalityKind, encoded: bool) -> dict[str, Any]:
    if kind.is_file:
        about = "a file in base64" if encoded else "a file"
        form = "byte" if encoded else "binary"
        return {"type": "string", "format": form, "description": f"{kind.name}: {about}", "nullable": True}
    return {"description": kind.name, "nullable": True} | ({"type": "string"} if kind.is_text else {})
