# For NVIDIA GPUs of compute capability 7.5 and newer (T4, A100, H100, L4, RTX, …). The host needs driver 580 or newer and NVIDIA's
# container toolkit; no CUDA. The versions are those of the stack tensorrt-cu13 in engines/targets/stacks.yaml.
#
#   make build
#   make interactive
#
# Not built by us where it was written: neither Docker's daemon nor this base image is to be had there. tests/test_docker.py lints it
# and holds its versions to the stack's.

FROM nvidia/cuda:13.0.2-base-ubuntu24.04

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
        torch==2.13.0 onnxruntime-gpu==1.31.1 tensorrt-cu13==11.4.0.106

# The source comes last: a change to it does not install the packages above again.
WORKDIR /home/txl/source
COPY --chown=10001 . .
RUN pip install --no-cache-dir --disable-pip-version-check --constraint constraints.txt \
        '.[onnx-gpu,report,tensorboard]' polygraphy==0.53.6

WORKDIR /workspace
CMD ["txl", "doctor"]
