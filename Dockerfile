# Training image for NVIDIA GPUs: the CUDA libraries come with torch's wheels, the driver from the host (NVIDIA container toolkit).
#   docker build -t lesionsam .
#   docker run --rm --gpus all -v "$PWD/own:/home/lesionsam/project/own" lesionsam
FROM python:3.11-slim-bookworm

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH

# git for DVC's experiments. Its version follows the base image: Debian keeps only the newest build of a release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/*

# The packages change seldom and weigh 6 GB: a layer of their own, before the code.
COPY requirements.lock /tmp/requirements.lock
RUN python -m venv "$VIRTUAL_ENV" \
    && pip install --require-hashes --requirement /tmp/requirements.lock

RUN useradd --create-home --uid 1000 lesionsam \
    && install --directory --owner lesionsam --group lesionsam /home/lesionsam/project
USER 1000:1000
WORKDIR /home/lesionsam/project
COPY --chown=1000:1000 . .

# The code by path instead of an installation: the environment belongs to root. Without .git DVC needs no_scm; a clone mounted
# over this folder brings its own settings.
ENV PYTHONPATH=/home/lesionsam/project/src
RUN dvc config --local core.no_scm true

CMD ["dvc", "repro"]
