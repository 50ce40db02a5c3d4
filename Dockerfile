# For a box with NVIDIA GPUs: the torch wheel brings CUDA, the host brings the driver.
#   docker build -t plmsae .                                                        this machine's architecture
#   docker buildx build --platform linux/amd64,linux/arm64 -t REGISTRY/plmsae --push .   both
#   docker run --rm --gpus all --ipc=host -v "$PWD:/work" plmsae run experiments
# `./setup.sh --which-torch` on the host names the index whose torch its driver can run:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 -t plmsae .
# Packages that some features want beside: --build-arg EXTRAS=optuna,fold
FROM python:3.12-slim-bookworm

ARG TORCH_INDEX=
ARG EXTRAS=optuna

# USER: torch.compile asks for a name, which another user (docker run --user) would not have.
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1 USER=plmsae

# Triton compiles the launchers of GPU kernels with it, on the box.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 plmsae \
    && install --directory --owner plmsae /work

WORKDIR /opt/plmsae
# Gigabytes in a layer of their own, which a change of the code leaves as it is.
COPY constraints.txt ./
# torchvision, which litdata asks for, must be of torch's build.
RUN pip install -c constraints.txt setuptools \
    && case ",$EXTRAS," in *,litdata,*) builds="torch|torchvision" ;; *) builds=torch ;; esac \
    && if [ -n "$TORCH_INDEX" ]; then pip install --no-deps --index-url "$TORCH_INDEX" $(grep -E "^($builds)==" constraints.txt); \
       else pip install -c constraints.txt torch; fi
COPY pyproject.toml README.md LICENSE ./
COPY plmsae_cli ./plmsae_cli
RUN pip install -c constraints.txt --no-build-isolation ".${EXTRAS:+[$EXTRAS]}"

USER 1000
WORKDIR /work
ENTRYPOINT ["plmsae"]
CMD ["--help"]
