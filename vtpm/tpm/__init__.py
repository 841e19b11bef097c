"""TPM 2.0 vocabulary; no I/O."""
