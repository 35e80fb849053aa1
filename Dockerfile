FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
RUN cargo build --release --locked -p seckill

FROM debian:bookworm-slim
# `seckill up` starts a Redis of its own; `seckill serve` does not need it.
RUN apt-get update && apt-get install -y --no-install-recommends redis-server \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 seckill && install -d -o seckill /data
COPY --from=build /src/target/release/seckill /usr/local/bin/seckill
USER seckill
WORKDIR /home/seckill
VOLUME /data
EXPOSE 8080 8081
ENTRYPOINT ["seckill"]
CMD ["--help"]
