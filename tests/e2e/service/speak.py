"""Runs in the VM: a daemon, and a client that speaks to its TPM over AF_VSOCK. Says what came of it in JSON.

The kernel's loopback is the peer with the CID 1, so that the operator's assignment decides whether that is a VM with a TPM.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc

from tests.support.vsock import LOCAL_CID, through_vsock
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.api.v1 import tpm_pb2
from vtpm.api.v1.instance_pb2_grpc import InstanceServiceStub
from vtpm.api.v1.tpm_pb2_grpc import TpmServiceStub

PORT = 7000
NAME = "vm-a"
TIMEOUT_S = 100.0
ROOT = Path("/tmp/vtpm")
LOG = ROOT / "log"


def start(cids: dict[int, str]) -> subprocess.Popen[bytes]:
    flags = ["--state-dir", str(ROOT / "state"), "--runtime-dir", str(ROOT / "run")]
    flags += ["--vsock-port", str(PORT), "--vsock-cids", json.dumps(cids)]
    with LOG.open("ab") as log:
        daemon = subprocess.Popen([sys.executable, "/code/server.py", *flags], stdout=log, stderr=log)
    deadline = time.monotonic() + TIMEOUT_S
    while not (ROOT / "run" / "operator.sock").exists():
        if daemon.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(LOG.read_text())
        time.sleep(0.05)
    return daemon


def speak(nonce: bytes) -> dict[str, object]:
    """Make and power on an instance as the operator; measure and quote as the VM."""
    with grpc.insecure_channel(f"unix:{ROOT / 'run' / 'operator.sock'}") as channel:
        instances = InstanceServiceStub(channel)
        profile = pb.Profile(ek_algorithms=[pb.ECC_P256])
        made = instances.CreateInstance(
            pb.CreateInstanceRequest(name=NAME, profile=profile), timeout=TIMEOUT_S, wait_for_ready=True
        )
        instances.StartInstance(pb.StartInstanceRequest(instance=NAME, startup=pb.STARTUP_CLEAR), timeout=TIMEOUT_S)
        selection = tpm_pb2.PcrSelection(hash_algorithm="sha256", indices=[16])
        with through_vsock(ROOT / "vm", PORT), grpc.insecure_channel(f"unix:{ROOT / 'vm'}") as vm:
            tpm = TpmServiceStub(vm)
            tpm.Measure(tpm_pb2.MeasureRequest(pcr=16, data=b"a kernel", event_type=13), timeout=TIMEOUT_S)
            read = tpm.ReadPcrs(tpm_pb2.ReadPcrsRequest(selections=[selection]), timeout=TIMEOUT_S)
            quote = tpm.Quote(tpm_pb2.QuoteRequest(selections=[selection], nonce=nonce), timeout=TIMEOUT_S)
        asked = TpmServiceStub(channel).ReadPcrs(
            tpm_pb2.ReadPcrsRequest(instance=NAME, selections=[selection]), timeout=TIMEOUT_S
        )
    return {
        "ak": next(key.public_pem for key in made.keys if key.role == pb.AK),
        "pcr": read.values[0].digest.hex(),
        "asked": asked.values[0].digest.hex(),
        "attest": quote.attest.hex(),
        "signature": quote.signature.hex(),
    }


def knock() -> str:
    """What a peer without an assignment gets: the bytes in hex until the end of the connection."""
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
        sock.settimeout(TIMEOUT_S)
        sock.connect((LOCAL_CID, PORT))
        received = b""
        try:
            sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            while part := sock.recv(4096):
                received += part
        except ConnectionError:
            # Closed with what was sent not read.
            pass
        return received.hex()


def main() -> None:
    ROOT.mkdir()
    daemon = start({LOCAL_CID: NAME})
    told = speak(bytes.fromhex(sys.argv[1]))
    daemon.send_signal(signal.SIGTERM)
    told["status"] = daemon.wait(TIMEOUT_S)
    start({3: NAME})
    told["stranger"] = knock()
    told["log"] = [json.loads(line) for line in LOG.read_text().splitlines() if line.startswith("{")]
    sys.stdout.write(json.dumps(told))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
