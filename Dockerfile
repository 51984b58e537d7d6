# An image in which both commands run: `make train`, which it does by itself, and `make test`.
#
#   docker build -t cure-fast .
#   docker build -t cure-fast --build-arg BASE=nvidia/cuda:13.0.2-base-ubuntu24.04 .    for a GPU
#   docker build -t cure-fast --build-arg SKIP_FFCV=1 .                                 smaller
#
#   docker run --rm -v "$PWD/runs:/cure-fast/runs" cure-fast       (for a GPU: --gpus all)
#   docker run --rm cure-fast make test
ARG BASE=ubuntu:24.04
FROM ${BASE}
# Triton compiles the launchers of its kernels by a C compiler and Python's headers.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc git make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /cure-fast
COPY . .
ARG SKIP_FFCV
RUN PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1 make setup && rm -rf /var/lib/apt/lists/*
CMD ["make", "train"]
