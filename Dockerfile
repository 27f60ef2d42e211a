# Image of Sartor for CPUs, or for NVIDIA GPUs with DEVICE=cuda. docs/docker.md goes through it.
#
#   docker build --tag sartor .
#   docker build --tag sartor:cuda --build-arg DEVICE=cuda .
#   docker run --rm --network none --volume "$PWD:/work" sartor tune tune.yaml --out adapters/faq
#
# The network is used while the image is built, and not by what it runs. Hashes of requirements/*.lock hold for all that
# `make demo` installs; what EXTRAS adds, and torch for CUDA, come by version alone.

# of the versions in requirements/torch-cpu.lock; the image's digest pins its bytes: python:3.11-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# cpu or cuda
ARG DEVICE=cpu
# extras of pyproject.toml beside those of the lock (tune, demo)
ARG EXTRAS=serve,office
# assets that the image holds (`sartor assets list`): the small base, and the rows by which forgetting is measured
ARG ASSETS="starter chitchat"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ONLY_BINARY=:all: PATH=/opt/sartor/bin:$PATH
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN python -m venv /opt/sartor
WORKDIR /source
COPY requirements requirements
COPY tools/lock.py tools/lock.py
# torch for CPUs by its hash; for CUDA the same release of the public index, with NVIDIA's libraries
RUN if [ "$DEVICE" = cuda ]; then \
      release=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' requirements/torch-cpu.lock | sort -u); \
      pip install "torch==$release"; \
    else \
      pip install --require-hashes --no-deps --index-url https://download.pytorch.org/whl/cpu \
        --requirement requirements/torch-cpu.lock; \
    fi
RUN pip install --require-hashes --no-deps --requirement requirements/demo.lock
COPY pyproject.toml README.md LICENSE ./
COPY tools/package_metadata.py tools/package_metadata.py
COPY src src
# the package is built by the locked hatchling; extras keep every locked version
RUN extras="tune,demo${EXTRAS:+,$EXTRAS}"; \
    if [ "$DEVICE" = cuda ]; then extras="$extras,cuda"; fi; \
    python tools/lock.py constraints | sed '/^torch/d' > /tmp/constraints.txt; \
    pip install --no-build-isolation --constraint /tmp/constraints.txt "/source[$extras]"; \
    pip check
ENV SARTOR_HOME=/opt/sartor-home
RUN mkdir -p "$SARTOR_HOME"; for asset in $ASSETS; do sartor assets install "$asset"; done

FROM ${PYTHON_IMAGE} AS sartor
LABEL org.opencontainers.image.title="sartor" \
      org.opencontainers.image.description="Tailor an open foundation model to your own data, and prove what you made" \
      org.opencontainers.image.licenses="Apache-2.0"
# the compiler makes the CPU kernels, once, for the processor that runs them; a distribution removes old versions of a
# package, so none is named
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 sartor \
    && useradd --uid 10001 --gid sartor --create-home --shell /usr/sbin/nologin sartor
COPY --from=build /opt/sartor /opt/sartor
COPY --from=build --chown=sartor:sartor /opt/sartor-home /var/lib/sartor
ENV PATH=/opt/sartor/bin:$PATH \
    SARTOR_HOME=/var/lib/sartor \
    HF_HUB_OFFLINE=1 \
    PYTHONUNBUFFERED=1
RUN install --directory --owner sartor --group sartor /work
USER 10001:10001
WORKDIR /work
EXPOSE 8440
STOPSIGNAL SIGTERM
ENTRYPOINT ["sartor"]
CMD ["--help"]
