"""Image encoders from a Hugging Face folder.

Axes: B images, H x W pixels, S x S' pixels once prepared, D features.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmkt_ray.encoders.pretrained import folder as folders
from mmkt_ray.encoders.pretrained.image_networks import PretrainedImageEncoder
from mmkt_ray.errors import DataError
from mmkt_ray.lazy import lazy

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn
else:
    np, nn = lazy("numpy"), lazy("torch.nn")

# networks of transformers whose image tower shares a space with another: class, its output
ALIGNED = {
    "clip": ("CLIPVisionModelWithProjection", "image_embeds"),
    "siglip": ("SiglipVisionModel", "pooler_output"),
}

class HuggingFaceImageEncoder(PretrainedImageEncoder):
    """A network in a Hugging Face folder: its pooled output, or its first token where the weights have no pooler.

    CLIP's and SigLIP's image towers are projected into the space that they share with the text tower, at unit length.
    Images are resized and cropped as the folder's processor does it, and normalised by its mean and std.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.folder = Path(config.folder)
        self.card = folders.read_config_json(self.folder)
        self.file = folders.processor_file(self.folder, "images")
        self.aligned = ALIGNED.get(str(self.card.get("model_type")))
        self.dim = self._width()
        self.pooler = True

    def _width(self) -> int:
        settings = folders.read_config(self.folder)
        if self.aligned and self.card["model_type"] == "clip":
            return int(settings.projection_dim)
        settings = settings.vision_config if self.aligned else settings
        widths = getattr(settings, "hidden_sizes", None) or [getattr(settings, "hidden_size", None)]
        if not isinstance(widths[-1], int):
            raise DataError(
                f"'{self.folder}/config.json' names no hidden_size: not an image network that is known here"
            )
        return widths[-1]

    @property
    def processor(self) -> Any:
        """The folder's own."""
        return folders.open_processor(self.folder, "AutoImageProcessor")

    @property
    def side(self) -> int:
        """Of the square with as many pixels as an image that goes in."""
        shape = self.prepared_shape
        return max(1, round((shape[1] * shape[2]) ** 0.5))

    @property
    def prepared_shape(self) -> tuple[int, ...]:
        """(3, S, S')."""
        return prepared_shape(self.folder)

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (3, S, S') uint8, resized and cropped as the folder's processor does it."""
        return run_processor(self.folder, image)

    def open(self) -> tuple[nn.Module, str]:
        auto = self.aligned[0] if self.aligned else "AutoModel"
        model, lacking = folders.open_network(self.folder, auto, may_lack=() if self.aligned else ("pooler.",))
        self.pooler = not lacking
        own = self.processor
        scale = float(own.rescale_factor) if own.do_rescale else 1.0
        mean, std = (own.image_mean, own.image_std) if own.do_normalize else ((0.0,) * 3, (1.0,) * 3)
        self.mean, self.std = (tuple(value / scale for value in values) for values in (mean, std))
        return model, folders.digest_files(self.folder, self.file)

    def features(self, x: Tensor) -> Tensor:
        output = self.model(pixel_values=x)
        if self.aligned:
            return nn.functional.normalize(output[self.aligned[1]].float(), dim=1)
        pooled = output.get("pooler_output") if self.pooler else None
        return (output.last_hidden_state[:, 0] if pooled is None else pooled).flatten(1)


def run_processor(folder: Path, image: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) uint8 as the folder's processor resizes and crops it: (3, S, S') uint8.
    Raises: DataError."""
    processor = folders.open_processor(folder, "AutoImageProcessor")
    raw = {"do_rescale": False, "do_normalize": False, "input_data_format": "channels_last"}
    pixels = processor(images=np.array(image), return_tensors="np", **raw)
    array = np.asarray(pixels["pixel_values"][0])
    if array.ndim != 3 or len(array) != 3:
        raise DataError(f"the processor in '{folder}' gives arrays of shape {array.shape}, not (3, height, width)")
    return np.ascontiguousarray(array.clip(0, 255).round().astype(np.uint8))


@cache
def prepared_shape(folder: Path) -> tuple[int, ...]:
    """What the folder's processor makes of images. Raises: DataError if it depends on the image."""
    shapes = {run_processor(folder, np.zeros((*size, 3), dtype=np.uint8)).shape for size in ((90, 60), (60, 90))}
    if len(shapes) > 1:
        raise DataError(
            f"the processor in '{folder}' gives images of different shapes: state a size with height and width, or a "
            "crop, in its preprocessor_config.json"
        )
    return shapes.pop()
