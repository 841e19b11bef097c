"""Sealed state: envelopes and key providers."""
