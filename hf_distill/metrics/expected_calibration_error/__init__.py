"""The `evaluate` module `expected_calibration_error`."""
