"""`mmkt submit` as a script: python jobs/submit.py jobs/configs/X.yaml --address http://HEAD:8265"""

import sys

from mmkt_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["submit", *sys.argv[1:]]))
