"""All encoders and reducers of the project, by the name that a config gives.
A new one is its class and an entry here."""

from __future__ import annotations

from mmkt_ray.encoders.audio import LogMelCnnAudioEncoder
from mmkt_ray.encoders.encoder import ListedEncoder
from mmkt_ray.encoders.identity import IdentityEncoder
from mmkt_ray.encoders.image import CnnImageEncoder, PixelsImageEncoder
from mmkt_ray.encoders.pretrained.huggingface import HuggingFaceEncoder
from mmkt_ray.encoders.pretrained.image_networks import EfficientNetLite0ImageEncoder, TorchvisionImageEncoder
from mmkt_ray.encoders.pretrained.text_networks import MinilmTextEncoder
from mmkt_ray.encoders.pretrained.timm_images import TimmImageEncoder
from mmkt_ray.encoders.reduce import PcaReducer, Reducer, Standardizer, SvdReducer
from mmkt_ray.encoders.select import SelectReducer
from mmkt_ray.encoders.table import TableEncoder
from mmkt_ray.encoders.text import TfidfEncoder

ENCODERS: dict[str, type[ListedEncoder]] = {
    "cnn": CnnImageEncoder,
    "pixels": PixelsImageEncoder,
    "tfidf": TfidfEncoder,
    "logmel_cnn": LogMelCnnAudioEncoder,
    "torchvision": TorchvisionImageEncoder,
    "efficientnet-lite0": EfficientNetLite0ImageEncoder,
    "timm": TimmImageEncoder,
    "minilm": MinilmTextEncoder,
    "huggingface": HuggingFaceEncoder,
    "table": TableEncoder,
    "identity": IdentityEncoder,
}

REDUCERS: dict[str, type[Reducer]] = {
    "pca": PcaReducer,
    "svd": SvdReducer,
    "standardize": Standardizer,
    "select": SelectReducer,
}
