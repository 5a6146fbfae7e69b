"""The `evaluate` module `macro_f1`."""
