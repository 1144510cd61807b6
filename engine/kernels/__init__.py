"""What a layer computes with: C++ for CPUs, loaded by ctypes, and torch for everything else."""
