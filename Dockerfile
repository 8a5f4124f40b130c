# An image with batchq and nothing of yours: exact versions, checked by their hashes. It runs as nobody, and needs no
# writable file: docker run --read-only --cap-drop ALL --security-opt no-new-privileges batchq status
#   docker build --tag batchq .
# Your app's image starts from it: FROM batchq, COPY tasks.py /app/, and CMD ["workers", "1", "tasks:app"].
# BASE: any image with Python 3.11 or later. BUILD_BASE: one with a pip that reaches a package index.
ARG BASE=python:3.13-slim
ARG BUILD_BASE=${BASE}

FROM ${BUILD_BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
COPY requirements/build.lock requirements/container.lock /locks/
# The same path as below, because a virtual environment cannot move.
RUN python3 -m venv /tools && /tools/bin/pip install --no-deps --require-hashes --requirement /locks/build.lock \
    && python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-compile --no-deps --require-hashes --requirement /locks/container.lock
COPY pyproject.toml README.md LICENSE hatch_build.py /source/
COPY migrations /source/migrations
COPY batchq /source/batchq
# pip leaves with its last call: the image installs nothing.
RUN /tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels /source \
    && /opt/venv/bin/pip install --no-compile --no-deps --no-index /wheels/*.whl \
    && /opt/venv/bin/python -m compileall -q /opt/venv \
    && /opt/venv/bin/pip uninstall --yes pip

FROM ${BASE}
COPY --from=build /opt/venv /opt/venv
# The metrics port answers /healthz, which the check below asks.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 BATCHQ_METRICS_PORT=9400
WORKDIR /app
USER 65534:65534

# A list, not a string, makes batchq process 1, which gets the SIGTERM of `docker stop`.
ENTRYPOINT ["batchq"]
CMD ["--help"]
STOPSIGNAL SIGTERM
# Whether the worker polls, not whether the database answers, because a restart does not bring the database back.
HEALTHCHECK --interval=30s --timeout=10s --start-period=15s CMD ["python3", "-c", \
    "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"BATCHQ_METRICS_PORT\"]}/healthz', timeout=5)"]
