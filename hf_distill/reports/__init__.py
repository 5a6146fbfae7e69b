"""Measuring a student and telling about it."""
