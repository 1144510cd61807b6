"""Reading weights, each rank its own slices."""
