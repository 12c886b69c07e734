"""The vLLM engine: the forward passes in vLLM's workers, everything else as in the torch engine."""
