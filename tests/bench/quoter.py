"""A gRPC client that asks for quotes of many instances at once."""

from __future__ import annotations

import asyncio
import sys
import time

import grpc.aio
import uvloop

from vtpm.api.v1 import tpm_pb2, tpm_pb2_grpc


async def main(address: str, seconds: float, instances: int) -> int:
    """Ask for `seconds`, one call at a time for each instance; return how many were answered."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = tpm_pb2_grpc.TpmServiceStub(channel)
        selection = tpm_pb2.PcrSelection(hash_algorithm="sha256", indices=range(8))
        end = time.perf_counter() + seconds

        async def ask(number: int) -> int:
            request = tpm_pb2.QuoteRequest(instance=f"bench-{number}", selections=[selection], nonce=b"bench")
            count = 0
            while time.perf_counter() < end:
                await stub.Quote(request)
                count += 1
            return count

        return sum(await asyncio.gather(*(ask(number) for number in range(instances))))


if __name__ == "__main__":
    sys.stdout.write(str(uvloop.run(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3])))))
