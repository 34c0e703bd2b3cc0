"""The HPC Challenge, saved in the middle of its benchmarks."""
