"""What the orchestrator tells its ranks beyond torchrun's variables. Under torchrun itself none of these is set."""

PARENT_PID_VARIABLE = "RYZANSTEIN_PARENT_PID"  # the rank dies with this process
STORE_FD_VARIABLE = "RYZANSTEIN_STORE_FD"  # rank 0 inherits a socket that listens on MASTER_ADDR:MASTER_PORT
EPOCH_VARIABLE = "RYZANSTEIN_EPOCH"  # of the rank's group; the file of its task, which all epochs share, says the first
