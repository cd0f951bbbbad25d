"""`python -m fastcl.info`: versions, the backend of every op, and why a fallback is used."""

import importlib.metadata
import platform

import torch

from . import _native


def _version(package: str, missing: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return missing


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def report() -> str:
    """The text that `python -m fastcl.info` prints."""
    # Here, so that the versions stay importable on their own.
    from . import ops

    rows = [
        ("fastcl", _version("fastcl", "not installed (running from source)")),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", _version("triton", "not installed")),
        ("CUDA device", _device()),
    ]
    rows += [(f"_C {key}", str(value)) for key, value in _native.build_info().items()]
    for op in ops.SCHEMAS:
        rows += [(f"{op} {device}", serves) for device, serves in ops.backends(op).items()]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows)


if __name__ == "__main__":
    print(report())
