"""Samples -> features in Parquet, and the store that opens them."""
