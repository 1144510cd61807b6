"""Everything that /metrics shows, from one table."""
