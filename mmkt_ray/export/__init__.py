"""A model folder as one file that runs without this library: by onnxruntime, or by PyTorch alone."""

from mmkt_ray.export.export import TARGETS, Exported, export_model

__all__ = ["TARGETS", "Exported", "export_model"]
