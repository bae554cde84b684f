"""Features -> fitted models: batches, criterion, the loop in plain torch, and its Ray Train adapter."""
