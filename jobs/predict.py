"""`mmkt predict` as a script, for: ray job submit --working-dir .
-- python jobs/predict.py MODEL INPUT --out FOLDER"""

import sys

from mmkt_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
