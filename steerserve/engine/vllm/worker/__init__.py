"""What runs inside the processes of vLLM: the model, the steps of its workers, and how they are registered."""
