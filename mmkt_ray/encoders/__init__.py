"""Encoders turn raw values of one modality into feature vectors; reducers make these smaller. No Ray in here."""
