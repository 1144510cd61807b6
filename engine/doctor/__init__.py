"""What `ryzanstein doctor` checks where the engine runs: packages, machine, model directory, real rank processes."""
