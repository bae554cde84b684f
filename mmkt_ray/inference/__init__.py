"""A model folder, and predictions from it."""
