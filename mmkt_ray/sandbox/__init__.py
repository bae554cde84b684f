"""Child processes that decode what may crash."""
