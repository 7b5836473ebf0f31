"""Real training runs to watch: small enough for a laptop, honest enough to learn from."""
