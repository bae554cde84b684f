"""What differs between kinds: of a modality in the classes of modalities.py, of a task in those of tasks.py."""
