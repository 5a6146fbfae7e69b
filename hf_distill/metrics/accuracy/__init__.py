"""The `evaluate` module `accuracy`."""
