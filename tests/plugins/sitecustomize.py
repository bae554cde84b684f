"""Python imports this on its start: processes learn to die of the images of poison.py and of the shards of
poison_shard.py."""

import sys

import poison_shard

poison_shard.seep_in()
if "mmkt_ray.sandbox.child" in sys.orig_argv:
    import poison

    poison.seep_in()
