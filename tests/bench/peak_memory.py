"""A worker extension of vLLM's, which `bench_transfer.py` gives both of its servers."""

import torch


class PeakMemory:
    """GPU memory that a worker allocates."""

    def start_peak(self) -> None:
        """From what is allocated now."""
        self.idle = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)

    def extra_gib(self) -> float:
        """At most, since `start_peak`: updates and answers."""
        return (torch.cuda.max_memory_allocated(self.device) - self.idle) / 2**30
