"""Software TPMs: processes, sandbox, link."""
