"""`python -m mmkt_ray` is `mmkt`."""

import sys

from mmkt_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())
