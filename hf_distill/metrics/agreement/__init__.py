"""The `evaluate` module `agreement`."""
