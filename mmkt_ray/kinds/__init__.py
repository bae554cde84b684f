"""What differs between kinds: of a modality in modalities.py, of a task in tasks.py."""
