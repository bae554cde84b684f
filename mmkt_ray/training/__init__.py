"""Features -> fitted models: batches, objective, the loop in plain torch, and its Ray Train adapter."""
