"""Training: the driver, the worker, the loop and what it drives."""
