"""Multimodal knowledge transfer as batch processing on Ray."""

__version__ = "0.1.0"  # not from the metadata: a job brings the code to nodes where it is not installed
