"""Labels in a short notation: codes, MISSING for no label and UNSEEN for a class that train lacks."""

import numpy as np

from mmkt_ray.kinds.labels import Labels
from mmkt_ray.kinds.tasks import task_kind

MISSING, UNSEEN = -1, -2


def labels_of(codes, kind=None):
    """Of codes (N,), or rows (N, C) of 0 and 1, as an array or a tensor; a row of MISSING has no label."""
    sets = codes.ndim == 2
    codes = np.asarray(codes) if isinstance(codes, np.ndarray) else codes
    known = (codes >= 0).all(1) if sets else codes >= 0
    kind = task_kind(kind or ("multilabel" if sets else "multiclass"))
    return Labels(kind, codes.clip(0), known if sets else codes != MISSING, known)


def codes_of(labels):
    """The inverse."""
    codes = labels.values.copy() if isinstance(labels.values, np.ndarray) else labels.values.clone()
    codes[~labels.known] = UNSEEN
    codes[~labels.labelled] = MISSING
    return codes


def coded(codes, kinds=None):
    """task -> labels, of task -> codes."""
    return {task: labels_of(own, (kinds or {}).get(task)) for task, own in codes.items()}
