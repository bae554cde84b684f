"""Questions asked of a run: what each modality knows, transfer, repeats, missing modalities, label issues."""
