"""Builds fastcl, with the C++ kernels where torch and a compiler are at hand.

Project metadata is in pyproject.toml. Whatever keeps the extension from building leaves a working
pure-Python package, and one line that says so.
"""

import json
import os
import sys
from pathlib import Path

from setuptools import setup

SOURCES = sorted(path.as_posix() for path in Path("csrc").rglob("*.cpp"))
HEADERS = sorted(path.as_posix() for pattern in ("*.h", "*.inl") for path in Path("csrc").rglob(pattern))
RECORD = Path("fastcl", "_C_build.json")


def warn_pure_python(reason):
    print(f"warning: fastcl: building without C++ kernels: {reason}", file=sys.stderr)


def openmp_link_args(torch_lib):
    """Link the OpenMP runtime that torch itself loads.

    With a second one the matrix products inside our parallel regions would not know that they are
    in one, and start threads of their own.
    """
    bundled = sorted(path.name for path in torch_lib.glob("libgomp*.so*"))
    return [f"-l:{bundled[0]}"] if bundled else ["-fopenmp"]


def native_build():
    """Arguments for setup() that build `fastcl._C`."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class BuildOrSkip(BuildExtension):
        """Builds `_C` and records its torch version beside it, or skips both."""

        def run(self):
            try:
                super().run()
            except (Exception, SystemExit) as error:
                warn_pure_python(str(error).strip().splitlines()[-1] if str(error) else repr(error))
                self.extensions = []
                # A record from an earlier build would vouch for a stale library.
                for record in self.records():
                    record.unlink(missing_ok=True)
                return
            content = json.dumps({"torch": torch.__version__, "python": sys.version.split()[0]})
            for record in self.records():
                record.parent.mkdir(parents=True, exist_ok=True)
                record.write_text(content + "\n")

        def records(self):
            return [RECORD] if self.inplace else [Path(self.build_lib, RECORD)]

        def get_outputs(self):
            return super().get_outputs() + ([str(Path(self.build_lib, RECORD))] if self.extensions else [])

    flags, link = ["-O3", "-g0"], []
    if os.name == "posix":
        # Contraction gives fused multiply-adds; ISO mode of GCC turns it off.
        flags += ["-ffp-contract=fast", "-Wall", "-Wextra"]
        if sys.platform.startswith("linux"):
            flags.append("-fopenmp")
            link = openmp_link_args(Path(torch.__file__).parent / "lib")
    extension = CppExtension(
        "fastcl._C", SOURCES, depends=HEADERS, extra_compile_args=flags, extra_link_args=link
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildOrSkip}}


try:
    arguments = native_build()
except Exception as error:
    warn_pure_python(f"torch's extension builder is not usable ({error})")
    arguments = {}
setup(**arguments)
