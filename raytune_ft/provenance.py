"""What a result was computed with: versions of libraries, and the machine."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

_LIBRARIES = ("ray", "torch", "transformers", "peft", "bitsandbytes", "numpy", "pyarrow")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that the result depends on."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def machine() -> dict[str, str]:
    """What the result was computed on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    return {"system": f"{platform.system()} {platform.machine()}", "device": device}
