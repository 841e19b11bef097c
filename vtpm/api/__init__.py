"""gRPC front: protos in, values of the instance room out; no logic of instances lives here."""
