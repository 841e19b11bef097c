"""gRPC front: protos in, values of the instance room out; no logic of instances lives here."""

import os

# What gRPC's core writes about single calls to stderr, past our log: a peer decides how often that is.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
