"""The GPU suite: correctness checks and measurements that need a CUDA device."""
