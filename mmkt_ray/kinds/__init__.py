"""What differs between kinds: of a modality in modalities.py, of a task in base.py and the classes of tasks.py."""
