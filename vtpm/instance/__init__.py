"""The heart: instances and their life."""
