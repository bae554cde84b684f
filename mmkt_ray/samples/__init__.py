"""Raw shards -> samples: rows in which any modality or label may be null."""
