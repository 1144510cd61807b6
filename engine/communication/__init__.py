"""Process groups and timed collectives."""
