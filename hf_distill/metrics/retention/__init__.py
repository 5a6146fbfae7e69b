"""The `evaluate` module `retention`."""
