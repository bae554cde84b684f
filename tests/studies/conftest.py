"""Tables and configs to train on: those of training's tests."""

from tests.training.conftest import free_port, make_config, table

__all__ = ["free_port", "make_config", "table"]
