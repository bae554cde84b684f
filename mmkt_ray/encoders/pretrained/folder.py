"""A network in a Hugging Face folder: its card, its weights, and what its files are told apart by.
No code of a folder is run."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmkt_ray.encoders.pretrained.weights import sha256
from mmkt_ray.errors import DataError
from mmkt_ray.lazy import lazy

if TYPE_CHECKING:
    import safetensors
    import torch
    from torch import nn

    from mmkt_ray import storage
else:
    torch, safetensors, storage = lazy("torch"), lazy("safetensors"), lazy("mmkt_ray.storage")

SAFE = {"local_files_only": True, "trust_remote_code": False}
_OF_FILES = (OSError, ValueError, RuntimeError, KeyError, TypeError)  # of transformers, for files that do not fit
# the second since transformers 5, of several modalities
PROCESSOR = ("preprocessor_config.json", "processor_config.json")


def read_config_json(folder: Path, *also: str) -> dict[str, Any]:
    """The folder's config.json. also: other files that must be there. Raises: DataError."""
    for name in ("config.json", *also):
        if not (folder / name).is_file():
            raise DataError(
                f"no {name} in '{folder}': save a model with `model.save_pretrained(folder)` and its fast tokenizer "
                "or processor with `tokenizer.save_pretrained(folder)`, where every node of the cluster finds them"
            )
    card = storage.read_json(str(folder / "config.json"))
    if not isinstance(card, dict):
        raise DataError(f"'{folder}/config.json' is no mapping: copy the folder again")
    return card


def read_config(folder: Path) -> Any:
    """transformers' own config of the folder, defaults filled in.
    Raises: DataError for a kind of network that it lacks."""
    try:
        return importlib.import_module("transformers").AutoConfig.from_pretrained(folder, **SAFE)
    except _OF_FILES as error:
        raise DataError(f"cannot read '{folder}/config.json': {error}") from error


@cache
def open_processor(folder: Path, kind: str) -> Any:
    """The folder's image processor (kind: AutoImageProcessor) or feature extractor (AutoFeatureExtractor).
    Raises: DataError."""
    try:
        return getattr(importlib.import_module("transformers"), kind).from_pretrained(folder, **SAFE)
    except (*_OF_FILES, ImportError) as error:
        raise DataError(f"cannot read how '{folder}' prepares its input: {error}") from error


def processor_file(folder: Path, what: str) -> Path:
    """The file that says how input is prepared. Raises: DataError if there is none."""
    for name in PROCESSOR:
        if (folder / name).is_file():
            return folder / name
    raise DataError(
        f"no preprocessor_config.json in '{folder}': to encode {what} save the network's processor there "
        "(`AutoImageProcessor`, `AutoFeatureExtractor`), or name a folder whose network takes them"
    )


def open_network(folder: Path, auto: str, may_lack: tuple[str, ...] = ()) -> tuple[nn.Module, set[str]]:
    """The network of transformers' class `auto` with the folder's weights, and what of it the weights lack.

    may_lack: beginnings of the names of parameters that are not needed.

    Raises: DataError if there are no safetensors, if they are damaged, or lack anything else.
    """
    weight_files(folder)
    transformers = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # what is missing is said below
    try:
        model, loaded = getattr(transformers, auto).from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **SAFE
        )
    except (*_OF_FILES, safetensors.SafetensorError) as error:
        raise DataError(f"cannot load the model in '{folder}': {error}") from error
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    lacking = {str(name) for name in loaded["missing_keys"]} | {
        str(key[0]) for key in loaded.get("mismatched_keys", ())
    }
    if needed := sorted(name for name in lacking if not name.startswith(may_lack)):
        raise DataError(
            f"the weights in '{folder}' lack {len(needed)} tensors of the network that its config.json describes, "
            f"the first '{needed[0]}': copy the folder again"
        )
    return model, lacking


def weight_files(folder: Path) -> list[Path]:
    """Raises: DataError if there are none."""
    weights = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    if not weights:
        raise DataError(f"no .safetensors file in '{folder}': save the model with safe_serialization=True")
    return weights


def digest_files(folder: Path, *others: Path) -> str:
    """Of the folder's config and weights, and of other files between them."""
    return sha256(file.read_bytes() for file in [folder / "config.json", *others, *weight_files(folder)])
