"""`mmkt serve`: a model folder behind HTTP."""
