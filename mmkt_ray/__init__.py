"""Multimodal knowledge transfer as batch processing on Ray."""

import os

__version__ = "0.1.0"  # not from the metadata: a job brings the code to nodes where it is not installed

# Read when torch loads: threads that wait for each other sleep. Spinning, they would take the cores from Ray's processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
