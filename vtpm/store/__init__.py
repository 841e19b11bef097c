"""Instances and their sealed state, kept durably."""
