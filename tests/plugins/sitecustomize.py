"""Python imports this on its start: the processes that decode learn to die of the images of poison.py."""

import sys

if "mmkt_ray.samples.decoder" in sys.orig_argv:
    import poison

    poison.seep_in()
