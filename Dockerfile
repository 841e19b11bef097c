# The vTPM daemon. Build: docker build -t vtpm .    How to run it, and what a container costs: docs/operations.md.
FROM debian:bookworm-slim AS build
# hadolint ignore=DL3008  # Debian's stable packages are what the image is meant to have
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev libtss2-dev pkg-config python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE server.py ./
COPY vtpm vtpm
# EXTRAS='[otel]' adds traces.
ARG EXTRAS=
RUN python3 -m venv /opt/vtpm \
 && /opt/vtpm/bin/pip install --no-cache-dir ".${EXTRAS}" \
 && install -m 0644 server.py /opt/vtpm/server.py

FROM debian:bookworm-slim
# The libtss2 packages are the libraries that tpm2-pytss' extension module is linked with.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends \
      libseccomp2 libtpms0 libtss2-esys-3.0.2-0 libtss2-fapi1 libtss2-mu0 libtss2-rc0 libtss2-sys1 libtss2-tctildr0 python3 \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 vtpm \
 && useradd --uid 10001 --gid vtpm --home-dir /var/lib/vtpm --no-create-home --shell /usr/sbin/nologin vtpm \
 && install -d -m 0700 -o vtpm -g vtpm /var/lib/vtpm /run/vtpm
COPY --from=build /opt/vtpm /opt/vtpm
ENV PATH=/opt/vtpm/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    VTPM_STATE_DIR=/var/lib/vtpm \
    VTPM_RUNTIME_DIR=/run/vtpm \
    VTPM_LOG_FORMAT=json
USER 10001:10001
VOLUME ["/var/lib/vtpm", "/run/vtpm"]
# The daemon ends in order on SIGTERM.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 CMD ["python", "-c", "\
import grpc, os; \
from grpc_health.v1 import health_pb2 as pb, health_pb2_grpc as rpc; \
channel = grpc.insecure_channel('unix:' + os.environ['VTPM_RUNTIME_DIR'] + '/operator.sock'); \
raise SystemExit(rpc.HealthStub(channel).Check(pb.HealthCheckRequest(), timeout=3).status != pb.HealthCheckResponse.SERVING)"]
ENTRYPOINT ["python", "/opt/vtpm/server.py"]
