"""Images for the decoder: those of the readers' tests."""

from tests.samples.conftest import png

__all__ = ["png"]
