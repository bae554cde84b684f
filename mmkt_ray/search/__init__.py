"""Ray Tune over fusion, depth, sharing and training: one trial is one architecture and a population of candidates."""
