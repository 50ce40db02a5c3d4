# The same installation for a box with NVIDIA GPUs: the torch wheel brings CUDA, the host brings the driver.
#   docker build -t plmsae .
#   docker run --rm --gpus all --ipc=host -v "$PWD:/work" plmsae run experiments
FROM python:3.12-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

WORKDIR /opt/plmsae
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY plmsae_cli ./plmsae_cli
RUN pip install -c constraints.txt setuptools \
    && pip install -c constraints.txt --no-build-isolation .

RUN useradd --create-home --uid 1000 plmsae
USER 1000
WORKDIR /work
ENTRYPOINT ["plmsae"]
CMD ["--help"]
