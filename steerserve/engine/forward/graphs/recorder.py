"""Records forwards on CUDA devices; `graphed` and `recorded` beside it have everything that needs no CUDA."""

from collections.abc import Callable

import torch

WARM_UPS = 2
"""Runs before the one that is captured: libraries allocate and choose kernels in the first."""


class CudaRecorder:
    """Captures work as CUDA graphs that share one pool of memory; a `Recorder` as `graphed` defines it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture work, whose tensors are on the device; raises RuntimeError where it does what a graph cannot."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    work()
            torch.cuda.current_stream().wait_stream(self._stream)
            # Other threads may use the device meanwhile: requests are admitted while the engine runs.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                work()
        return graph.replay
