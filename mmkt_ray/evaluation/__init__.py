"""Scores with intervals, baselines, what each modality contributes, and which model is shown to be better.

Files that this package leaves in a run folder:

    <run>/models/<variant>/metrics.json               scores of one trained model (evaluate.py)
    <run>/models/<variant>/predictions-test.parquet   one row per sample it could read
    <run>/models/<variant>/gallery.json               some right and wrong samples (gallery.py)
    <run>/models/<variant>/missing.json               scores against the share of rows that lack a modality (missing.py)
    <run>/baselines/<store>/metrics.json              the same scores for each baseline on that store
    <run>/baselines/<store>/predictions-test.parquet  the same rows, with a `model` column
    <run>/models/.linear/<store>/<modalities>/        each logistic regression of them as a model folder
    <run>/report/results.json                         all models side by side (compare.py)
    <run>/insight.json                                what each modality knows (contribution.py)
    <run>/transferability.json                        scores of features before training (scores.py)
    <run>/suspects.parquet                            train rows to look at again (suspects.py)
"""
