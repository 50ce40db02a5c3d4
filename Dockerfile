# The same installation for a box with NVIDIA GPUs: the torch wheel brings CUDA, the host brings the driver.
#   docker build -t plmsae .                                                        this machine's architecture
#   docker buildx build --platform linux/amd64,linux/arm64 -t REGISTRY/plmsae --push .   both
#   docker run --rm --gpus all --ipc=host -v "$PWD:/work" plmsae run experiments
# `./setup.sh --which-torch` on the host names the index whose torch its driver can run:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 -t plmsae .
FROM python:3.12-slim-bookworm

ARG TORCH_INDEX=

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

WORKDIR /opt/plmsae
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY plmsae_cli ./plmsae_cli
RUN pip install -c constraints.txt setuptools \
    && if [ -n "$TORCH_INDEX" ]; then pip install --no-deps --index-url "$TORCH_INDEX" "$(grep ^torch== constraints.txt)"; fi \
    && pip install -c constraints.txt --no-build-isolation .

RUN useradd --create-home --uid 1000 plmsae
USER 1000
WORKDIR /work
ENTRYPOINT ["plmsae"]
CMD ["--help"]
