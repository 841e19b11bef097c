"""A TCTI that hands commands to the TPM of this worker, so that ESAPI needs no socket (TCG TSS 2.0 TCTI specification)."""

from __future__ import annotations

from tpm2_pytss.TCTI import PyTCTI

from vtpm.engine.software import SoftwareTpm


class InProcessTcti(PyTCTI):  # type: ignore[misc]  # tpm2-pytss ships no types
    """Runs each transmitted command at once, at locality 0, and keeps the response for the receive that follows."""

    def __init__(self, tpm: SoftwareTpm) -> None:
        super().__init__(max_size=4096)
        self._tpm = tpm
        self._response = b""

    def do_transmit(self, command: bytes) -> None:
        """Run `command`."""
        self._response = self.run(command)

    def run(self, command: bytes) -> bytes:
        """Run `command` at locality 0, whatever the guest's is; return the response."""
        guest_locality, self._tpm.locality = self._tpm.locality, 0
        try:
            return self._tpm.process(command)
        finally:
            self._tpm.locality = guest_locality

    def do_receive(self, timeout: int) -> bytes:
        """Return the response of the last command; it is always there already."""
        return self._response
