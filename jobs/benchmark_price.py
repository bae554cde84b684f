"""R2 of the price of baby products on the rows of MulTaBench (arXiv 2605.10616), beside what others reach there.

    python jobs/benchmark_price.py --data FOLDER

FOLDER holds tables/baby_products.csv. The benchmark's five splits are scikit-learn's `train_test_split` of a tenth of
the rows, random states 0 to 4. Its price is the price itself, and it leaves out numbers and SKU, as the config does.
Each split is a run of jobs/configs/baby_products_price.yaml. PUBLISHED are the benchmark's means over five splits:
AutoGluon-MM, and models on frozen small encoders. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from sklearn.model_selection import train_test_split

import mmkt_ray as mm

CONFIG = Path("jobs/configs/baby_products_price.yaml")
TABLE = "tables/baby_products.csv"
NUM_SPLITS, TEST_SHARE = 5, 0.1
PUBLISHED = {"TabPFN-2.5": 91.4, "AutoGluon-MM": 90.5, "TabM": 90.0, "CatBoost": 87.2, "LightGBM": 84.7}


def main() -> None:
    """Run the splits one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--out", default=Path("runs/price"), type=Path, metavar="FOLDER", help="data and runs")
    args = parser.parse_args()
    found = pd.DataFrame([r2_by_model(args.data, args.out, number) for number in range(NUM_SPLITS)])
    print("| model | " + " | ".join(f"split {number}" for number in range(NUM_SPLITS)) + " | mean |")
    print("|---" * (NUM_SPLITS + 2) + "|")
    for model, scores in found.items():
        print(f"| {model} | " + " | ".join(f"{score:.1f}" for score in scores) + f" | {scores.mean():.1f} |")
    for model, mean in PUBLISHED.items():
        print(f"| {model}, published |" + " |" * NUM_SPLITS + f" {mean:.1f} |")


def r2_by_model(data: Path, out: Path, number: int) -> dict[str, float]:
    """Test R2 in percent of every model of one split's run."""
    frame = pd.read_csv(data / TABLE, dtype=str, keep_default_na=False)
    _, test = train_test_split(np.arange(len(frame)), test_size=int(TEST_SHARE * len(frame)), random_state=number)
    frame["fold"] = np.where(np.isin(np.arange(len(frame)), test), "test", "train")
    root = out / f"data{number}"
    (root / TABLE).parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(root / TABLE, index=False)
    config = yaml.safe_load(CONFIG.read_text())
    del config["samples"]["split"]
    config["samples"]["sources"][0]["columns"]["split"] = "fold"
    results = mm.run(config | {"name": f"price{number}", "data_root": str(root), "run_root": str(out)})
    scores = results.tables["scores"]
    return dict(zip(scores["model"], 100 * scores["r2"], strict=True))


if __name__ == "__main__":
    main()
