"""What tests of several kinds need: a real daemon, real TPM clients."""
