"""From what stands on the command line to a directory that can be mapped: the hub, steps, the shard cache."""
