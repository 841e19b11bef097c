"""The `vtpm` command."""
