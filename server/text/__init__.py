"""Between text and token ids. Knows nothing of HTTP or of the engine."""
