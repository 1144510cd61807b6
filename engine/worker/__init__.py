"""One rank: the process that loads a shard and runs steps."""
