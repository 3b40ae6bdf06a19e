"""What only a CUDA device can show. Run with `pytest -m gpu` on a machine that has one."""
