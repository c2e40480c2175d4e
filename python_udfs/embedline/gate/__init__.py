"""Measure a version before it serves: its index, its model, and what they find."""
