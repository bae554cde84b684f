"""The comparison of a run: each model and baseline scored, side by side, and which one to ship.

Files that this package and `studies` leave in a run folder:

    <run>/models/<variant>/metrics.json               scores of one trained model (evaluate.py)
    <run>/models/<variant>/predictions-test.parquet   one row per sample it could read
    <run>/models/<variant>/gallery.json               some right and wrong samples (studies/gallery.py)
    <run>/models/<variant>/missing.json               scores with rows that lack a modality (studies/missing.py)
    <run>/baselines/<store>/metrics.json              the same scores for each baseline on that store
    <run>/baselines/<store>/predictions-test.parquet  the same rows, with a `model` column
    <run>/models/.linear/<digest>/<modalities>/       each logistic regression of them as a model folder
    <run>/report/results.json                         all models side by side (compare.py)
    <run>/insight.json                                what each modality knows (studies/contribution.py)
    <run>/transferability.json                        scores of features before training (studies/scores.py)
    <run>/suspects.parquet                            train rows to look at again (studies/label_issues.py)
"""
