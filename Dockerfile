# The service in an image: `make image` builds it, and docs/container.md says how it is run.
#
# Targets: `cpu`, the default, and `cuda`. Build arguments: BASE, a Debian whose python3 is 3.11 or newer; TORCH, which pip
# is handed first, with any options that it takes; EXTRAS of pyproject.toml; VERSION and REVISION for the labels.
# Build secrets, none of which must be there: `pip`, a pip.conf, and `ca`, the certificates that it names as
# /run/secrets/ca. Neither comes into any layer.

ARG BASE=docker.io/library/debian:12-slim

FROM ${BASE} AS python
# tini is process 1: it hands signals on and reaps what the ranks' parents leave.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates libstdc++6 python3 tini \
    && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log

# What builds, and is not in the image.
FROM python AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_CONFIG_FILE=/run/secrets/pip PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python3 -m venv --without-pip /opt/venv

# Layers that change when torch or pyproject.toml does, seldom.
FROM build AS torch
ARG TORCH=torch==2.13.0
# Its tests, headers and test programs are a quarter of its size, and nothing at run time. torch_shm_manager is needed.
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    python3 -m pip --python /opt/venv/bin/python install ${TORCH} \
    && torch=$(echo /opt/venv/lib/python3*/site-packages/torch) \
    && rm -rf "${torch}/include" "${torch}/test" \
    && find "${torch}/bin" -type f ! -name torch_shm_manager -delete

# Whether it is the torch that the target needs is asked before anything else is installed. What the targets copy from
# here, the version, is why these stages are built.
FROM torch AS torch-cuda
RUN ["/opt/venv/bin/python", "-c", "import pathlib, sys, torch; \
torch.version.cuda or sys.exit('TORCH: the target cuda needs a build with CUDA'); \
pathlib.Path('/opt/torch.version').write_text(torch.__version__)"]

FROM torch AS torch-cpu
RUN ["/opt/venv/bin/python", "-c", "import pathlib, sys, torch; \
torch.version.cuda and sys.exit('TORCH: the target cpu needs a CPU build'); \
pathlib.Path('/opt/torch.version').write_text(torch.__version__)"]

FROM torch AS dependencies
WORKDIR /src
COPY pyproject.toml ./
# With a root that cannot be written, nothing can be installed later: what some need and takes little is in.
ARG EXTRAS=traces
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    python3 -c 'import sys, tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
extras = [project["optional-dependencies"][name] for name in sys.argv[1].split(",") if name]; \
print(*project["dependencies"], *sum(extras, []), sep="\n")' "${EXTRAS}" > /tmp/requirements.txt \
    && python3 -m pip --python /opt/venv/bin/python install --requirement /tmp/requirements.txt

# The layer that changes with the sources: a few MB. On x86-64 it is an error if the kernels do not compile.
FROM dependencies AS package
COPY . ./
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    python3 -m pip --python /opt/venv/bin/python install --verbose --no-deps --prefix /opt/package . \
    && if [ "$(uname -m)" = x86_64 ]; then ls -l /opt/package/lib/python3*/site-packages/engine/kernels/*.so; fi

FROM python AS runtime
# Group 0, so that any other user of that group can write the caches too.
RUN useradd --uid 10001 --gid 0 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin ryzanstein \
    && install --directory --owner=10001 --group=0 --mode=0775 /cache /cache/huggingface /cache/shards
COPY deploy/container/healthcheck.py /opt/healthcheck.py
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=package /opt/package /opt/venv
ENV PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    HF_HOME=/cache/huggingface \
    RYZANSTEIN_SHARD_CACHE_DIR=/cache/shards \
    RYZANSTEIN_HOST=0.0.0.0
USER 10001:0
WORKDIR /
VOLUME ["/cache/huggingface", "/cache/shards"]
EXPOSE 8000
# A model may load for long: until the first success, failures do not count. What serves is seen to within half a minute.
HEALTHCHECK --interval=10s --timeout=5s --retries=3 --start-period=30m \
    CMD ["python", "-IS", "/opt/healthcheck.py"]
ENTRYPOINT ["/usr/bin/tini", "-s", "--", "ryzanstein"]
CMD ["serve"]
ARG BASE
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="ryzanstein" \
      org.opencontainers.image.description="Serves open-weights language models over an OpenAI-compatible API" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE}"

FROM runtime AS cuda
# For NVIDIA's container runtime. torch brings CUDA's libraries; the driver is the host's.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=torch-cuda /opt/torch.version /opt/torch.version

FROM runtime AS cpu
COPY --from=torch-cpu /opt/torch.version /opt/torch.version
