"""The certificate authority: profiles of EK, AK and platform certificates, and what signs them. No store, no engine."""
