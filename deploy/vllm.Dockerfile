# The image of the vLLM engine: vLLM's own, with steerserve beside it. From the root of the repository:
#
#   docker build -f deploy/vllm.Dockerfile -t steerserve:vllm .
#
# Not built by any test: the base is large, and only a machine with GPUs can run it.
# BASE  vLLM's image for the release that constraints-vllm.txt names; pin it by digest where it matters.

ARG BASE=docker.io/vllm/vllm-openai:v0.33.0
FROM ${BASE}
WORKDIR /src
COPY pyproject.toml constraints-vllm.txt README.md LICENSE ./
COPY schedulers schedulers
COPY steerserve steerserve
# The base has what vLLM needs, Ray aside; of steerserve's own dependencies it lacks a few, which pip adds.
RUN python3 -m pip install --no-cache-dir --constraint constraints-vllm.txt . "ray[default]"
RUN useradd --uid 10001 --user-group --create-home --home-dir /home/steerserve --shell /usr/sbin/nologin steerserve
ENV HOME=/tmp PYTHONUNBUFFERED=1 VLLM_NO_USAGE_STATS=1
WORKDIR /
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
ENTRYPOINT ["steerserve"]
CMD ["serve", "--engine", "vllm", "--host", "0.0.0.0", "--port", "8000"]
