# syntax=docker/dockerfile:1
# Two images from one file:
#   docker build --target aggregator -t fedmq-aggregator .      numpy, no torch
#   docker build --target worker     -t fedmq-worker .          torch; also init and evaluate
# For workers with a GPU, torch built for its CUDA: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY broker broker
COPY aggregator aggregator
COPY worker_client worker_client
COPY fedmq fedmq
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim AS aggregator-venv
COPY constraints-dev.txt /constraints.txt
RUN python -m venv /opt/fedmq
ENV PATH=/opt/fedmq/bin:$PATH
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir -c /constraints.txt /wheels/fedmq-*.whl

# torch first: its layer is by far the largest and changes the least.
# By itself: its index may lack the pinned releases of what it needs; the last line takes them from PyPI.
FROM python:${PYTHON}-slim AS worker-venv
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Of fedmq's optional dependencies, those that the tasks in this image use.
ARG EXTRA=demo
COPY constraints-dev.txt /constraints.txt
RUN python -m venv /opt/fedmq
ENV PATH=/opt/fedmq/bin:$PATH
RUN pip install --no-cache-dir --no-deps -c /constraints.txt --index-url "$TORCH_INDEX" torch
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir -c /constraints.txt "$(echo /wheels/fedmq-*.whl)[$EXTRA]"

FROM python:${PYTHON}-slim AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="fedmq" \
      org.opencontainers.image.description="Asynchronous federated learning over RabbitMQ" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
# A new volume takes over owner and mode of the folder in the image that it covers.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin fedmq \
    && install -d -o fedmq -g fedmq -m 0750 /var/lib/fedmq
ENV PATH=/opt/fedmq/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp
# A number, so that Kubernetes' runAsNonRoot can see that it is not root.
USER 10001:10001
WORKDIR /var/lib/fedmq
ENTRYPOINT ["fedmq"]
CMD ["--help"]

FROM runtime AS aggregator
LABEL org.opencontainers.image.title="fedmq aggregator"
COPY --from=aggregator-venv /opt/fedmq /opt/fedmq

FROM runtime AS worker
LABEL org.opencontainers.image.title="fedmq worker"
COPY --from=worker-venv /opt/fedmq /opt/fedmq
