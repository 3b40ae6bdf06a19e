"""Fine-tune language models on a Ray cluster: from a bucket of instructions to a bucket of adapters."""

from importlib.metadata import version

__version__ = version("raytune-ft")
