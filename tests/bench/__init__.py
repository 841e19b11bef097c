"""Measurements beside swtpm, in the same run: ./script/bench."""
