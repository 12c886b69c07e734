"""These tests run where vLLM is installed: `make test-vllm`."""

import importlib.util
import os

# Where vLLM is not there, its modules cannot even be imported.
collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]

# Read by vLLM when a worker starts; one thread each, since the models are tiny.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
