# The service, in two stages: build it, then put the program alone on a small system.
#
#   docker build --tag seckill .

FROM rust:1.95-bookworm AS build
# protoc and its files for etcd's client, OpenSSL and zlib for Kafka's.
RUN apt-get update \
    && apt-get install -y --no-install-recommends protobuf-compiler libprotobuf-dev libssl-dev zlib1g-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN cargo build --release --locked -p seckill

FROM debian:12-slim AS runtime
# redis-server is for `seckill up`; `seckill serve` has its Redis elsewhere.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates libssl3 redis-server zlib1g \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin seckill \
    && install --directory --owner seckill --group seckill /data
COPY --from=build /src/target/release/seckill /usr/local/bin/seckill
USER 10001
WORKDIR /home/seckill
# `up` and the example configurations keep everything there that has to stay.
VOLUME /data
# Public, admin, internal.
EXPOSE 8080 8081 8082
# /readyz says no only while starting or draining; the admin listener's port, if it is another one.
ENV SECKILL_HEALTH_PORT=8081
HEALTHCHECK --interval=5s --timeout=4s --start-period=30s --retries=3 CMD ["bash", "-c", \
    "exec 3<>/dev/tcp/127.0.0.1/$SECKILL_HEALTH_PORT && printf 'GET /readyz HTTP/1.0\\r\\nHost: localhost\\r\\n\\r\\n' >&3 && grep -q '^HTTP/1.[01] 200' <&3"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["seckill"]
CMD ["up", "--data-dir", "/data", "--bind", "0.0.0.0"]
