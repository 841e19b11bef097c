"""An engine host that is none: it greets the daemon as one, and then says whatever it is told to."""

from __future__ import annotations

import os
import random
import socket
import sys
import time

from tests.hostile.fuzz import filled, noise
from vtpm import __version__
from vtpm.engine.host import PROTOCOL
from vtpm.engine.v1 import link_pb2 as pb

_INSTANCE = "11111111-1111-1111-1111-111111111111"


def hello(connection: socket.socket) -> pb.HostReply:
    """Read a Hello; return the answer to it."""
    request = pb.HostRequest.FromString(connection.recv(65536))
    greeting = pb.HelloReply(
        protocol=PROTOCOL, version=__version__, engine_version="none", engines=["libtpms"], pid=os.getpid()
    )
    return pb.HostReply(id=request.id, hello=greeting)


def main(script: str, seed: int, listener: socket.socket) -> None:
    """Serve one daemon."""
    rng = random.Random(seed)
    connection, _ = listener.accept()
    match script:
        case "noise_instead_of_hello":
            hello(connection)
            connection.send(noise(rng))
        case "endless_hello":
            reply = hello(connection)
            reply.hello.more = True
            while True:
                connection.send(reply.SerializeToString())
        case "workers_that_cannot_be":
            reply = hello(connection)
            reply.hello.workers.add(instance="../../etc", epoch=1 << 63, pid=5)
            connection.send(reply.SerializeToString())
        case "noise":
            connection.send(hello(connection).SerializeToString())
            for _ in range(1000):
                connection.send(noise(rng))
        case "any_replies":
            connection.send(hello(connection).SerializeToString())
            for _ in range(1000):
                connection.send(filled(pb.HostReply, rng).SerializeToString() or b"\0")
        case "wakes_of_nobody":
            connection.send(hello(connection).SerializeToString())
            wake = pb.HostReply(wake=pb.Wake(instance=_INSTANCE, epoch=1))
            for pid in range(100_000):
                wake.wake.pid = pid
                connection.send(wake.SerializeToString())
            connection.send(b"\xff\xff")
        case "ends_of_nobody":
            connection.send(hello(connection).SerializeToString())
            ended = pb.HostReply(exited=pb.WorkerExited(instance=_INSTANCE, pid=5))
            ended.exited.parked.CopyFrom(pb.ParkedInstance(instance=_INSTANCE, roles=[pb.DATA] * 8))
            for epoch in range(20_000):
                ended.exited.epoch = ended.exited.parked.epoch = epoch
                socket.send_fds(connection, [ended.SerializeToString()], [connection.fileno()] * 8)
            connection.send(b"\xff\xff")
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main(sys.argv[4], int(sys.argv[5]), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, int(sys.argv[1])))
