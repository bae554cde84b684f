"""`mmkt doctor` as a script, for: mmkt submit jobs/configs/X.yaml --command doctor --address http://HEAD:8265"""

import sys

from mmkt_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["doctor", *sys.argv[1:]]))
