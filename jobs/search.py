"""`mmkt search` as a script, for: ray job submit --working-dir . -- python jobs/search.py jobs/configs/X.yaml"""

import sys

from mmkt_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["search", *sys.argv[1:]]))
