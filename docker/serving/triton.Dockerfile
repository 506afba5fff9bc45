# Triton Inference Server with txl in its Python backend, for CPUs: the release that the tests run (server 2.51).
#
#   docker compose --file docker/serving/compose.yaml up --build
#
# Not built by us where it was written: neither Docker's daemon nor this base image is to be had there. tests/deploy/triton/test_router.py lints it.

FROM nvcr.io/nvidia/tritonserver:24.10-py3

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

WORKDIR /opt/txl
COPY . .
# The constraint holds numpy below 2, whose arrays the Python backend of this release reads as empty ones.
RUN pip install --no-cache-dir --disable-pip-version-check --constraint triton-constraints.txt \
        --extra-index-url https://download.pytorch.org/whl/cpu '.[onnx]' torch==2.13.0

# The base image's own user, triton-server
USER 1000
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --start-period=60s CMD ["curl", "--fail", "--silent", "http://localhost:8000/v2/health/ready"]
CMD ["tritonserver", "--model-repository=/models", "--exit-timeout-secs=30"]
