# For the V100 and other GPUs of compute capability 7.0, whose software is frozen: no newer TensorRT, PyTorch or driver runs on them. The
# host needs a driver from 535 to 580 and NVIDIA's container toolkit; no CUDA. The versions are those of the stack tensorrt-10.4-volta in
# engines/targets/stacks.yaml.
#
#   make build GPU=v100
#   make interactive GPU=v100
#
# Not built by us where it was written: neither Docker's daemon nor this base image is to be had there. tests/test_docker.py lints it
# and holds its versions to the stack's.

FROM nvidia/cuda:12.8.1-base-ubuntu24.04

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# Ubuntu keeps no older versions of its packages, so only the release is pinned, by the base image.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates g++ git python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 txl \
    && install --directory --owner txl /opt/txl /workspace

USER 10001
ENV PATH=/opt/txl/bin:$PATH PYTHONUNBUFFERED=1
RUN python3.12 -m venv /opt/txl \
    && pip install --no-cache-dir --disable-pip-version-check --extra-index-url https://pypi.nvidia.com \
        torch==2.10.0 onnxruntime-gpu==1.23.2 tensorrt-cu12==10.4.0

# The source comes last: a change to it does not install the packages above again. constraints.txt is for a newer PyTorch, so its line
# is changed to the one above.
WORKDIR /home/txl/source
COPY --chown=10001 . .
RUN sed 's/^torch==.*/torch==2.10.0/' constraints.txt > /tmp/constraints.txt \
    && pip install --no-cache-dir --disable-pip-version-check --constraint /tmp/constraints.txt \
        '.[onnx-gpu,report,tensorboard]' polygraphy==0.53.6

WORKDIR /workspace
CMD ["txl", "doctor"]
