"""`mmkt extract` as a script, for: ray job submit --working-dir . -- python jobs/extract.py jobs/configs/X.yaml"""

import sys

from mmkt_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["extract", *sys.argv[1:]]))
