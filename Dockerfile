# The runtime: this package with the versions of requirements.lock, all extras. Built by `make test-deploy`.
#   docker build -t mmkt .
#   docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/runs:/runs:ro" mmkt serve /runs/openmoji --host 0.0.0.0
#   docker run --rm --shm-size=2g -v "$PWD:/work" mmkt run openmoji
FROM python:3.12-slim AS build
# uv of the lock, with its hashes, as `make env` takes it
COPY requirements.lock /build/
RUN sed -n '/^uv==/,/# via/p' /build/requirements.lock > /build/uv.lock \
    && pip install --no-cache-dir --require-hashes -r /build/uv.lock
RUN uv venv /opt/mmkt \
    && uv pip sync --no-cache --require-hashes --compile-bytecode --python /opt/mmkt/bin/python /build/requirements.lock
COPY pyproject.toml README.md LICENSE /build/
COPY mmkt_ray /build/mmkt_ray
COPY jobs/configs /build/jobs/configs
RUN uv pip install --no-cache --no-deps --python /opt/mmkt/bin/python /build

FROM python:3.12-slim
COPY --from=build /opt/mmkt /opt/mmkt
# compiled token kernels and Ray's sessions are written under the home folder and /tmp
RUN useradd --create-home mmkt && mkdir /work && chown mmkt /work
USER mmkt
WORKDIR /work
ENV PATH=/opt/mmkt/bin:$PATH PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
EXPOSE 8000
ENTRYPOINT ["mmkt"]
CMD ["--help"]
