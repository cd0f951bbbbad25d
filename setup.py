"""Builds fastcl, with the C++ kernels where torch and a compiler are at hand, and with the CUDA
kernels where torch is a CUDA build and nvcc is there too.

Project metadata is in pyproject.toml. Whatever keeps the extension from building leaves a working
package without CUDA kernels, or one of pure Python, and one line that says so.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from setuptools import setup


def files(folder, *patterns):
    return sorted(path.as_posix() for pattern in patterns for path in Path(folder).rglob(pattern))


CUDA_SOURCES = files("csrc/cuda", "*.cpp", "*.cu")
SOURCES = [path for path in files("csrc", "*.cpp") if path not in CUDA_SOURCES]
HEADERS = files("csrc", "*.h", "*.inl", "*.cuh")
RECORD = Path("fastcl", "_C_build.json")


def warn(what, error):
    """One line: the last of the message, where compilers put the summary."""
    reason = (str(error).strip().splitlines() or [repr(error)])[-1]
    print(f"warning: fastcl: building without {what}: {reason[:200]}", file=sys.stderr)


def openmp_link_args(torch_lib):
    """Link the OpenMP runtime that torch itself loads.

    With a second one the matrix products inside our parallel regions would not know that they are
    in one, and start threads of their own.
    """
    bundled = sorted(path.name for path in torch_lib.glob("libgomp*.so*"))
    return [f"-l:{bundled[0]}"] if bundled else ["-fopenmp"]


def compiler_flags():
    """Flags of the C++ compiler and of the linker."""
    import torch

    flags, link = ["-O3", "-g0"], []
    if os.name == "posix":
        # Contraction gives fused multiply-adds; ISO mode of GCC turns it off.
        flags += ["-ffp-contract=fast", "-Wall", "-Wextra"]
        if sys.platform.startswith("linux"):
            flags.append("-fopenmp")
            link = openmp_link_args(Path(torch.__file__).parent / "lib")
    return flags, link


def nvcc_flags():
    """torch adds the GPUs at hand, or what TORCH_CUDA_ARCH_LIST names, unless architectures are given."""
    import torch

    flags = ["-O3", "-std=c++17"]
    if torch.cuda.device_count() == 0 and "TORCH_CUDA_ARCH_LIST" not in os.environ:
        flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]
        flags += ["-gencode=arch=compute_90,code=compute_90"]
    return flags


def extensions():
    """`fastcl._C` without the CUDA kernels, and with them or None."""
    import torch
    from torch.utils import cpp_extension

    flags, link = compiler_flags()
    cpu = cpp_extension.CppExtension(
        "fastcl._C", SOURCES, depends=HEADERS, extra_compile_args=flags, extra_link_args=link
    )
    home = cpp_extension.CUDA_HOME
    if torch.version.cuda is None or home is None or shutil.which("nvcc", path=Path(home, "bin")) is None:
        return cpu, None
    cuda = cpp_extension.CUDAExtension(
        "fastcl._C",
        SOURCES + CUDA_SOURCES,
        depends=HEADERS,
        define_macros=[("FASTCL_CUDA", None)],
        extra_compile_args={"cxx": flags, "nvcc": nvcc_flags()},
        extra_link_args=link,
    )
    return cpu, cuda


def native_build():
    """Arguments for setup() that build `fastcl._C`."""
    import torch
    from torch.utils.cpp_extension import BuildExtension

    cpu, cuda = extensions()

    class BuildOrSkip(BuildExtension):
        """Builds `_C` and records its torch version beside it, or skips both."""

        def build(self):
            # A failing run leaves these two changed.
            compiler, inplace = self.compiler, self.inplace
            try:
                super().run()
            finally:
                self.compiler, self.inplace = compiler, inplace

        def build_cuda_or_cpu(self):
            try:
                self.build()
            except (Exception, SystemExit) as error:
                if cuda is None:
                    raise
                warn("CUDA kernels", error)
                for extension in self.extensions:
                    vars(extension).update(vars(cpu))
                self.build()

        def run(self):
            try:
                self.build_cuda_or_cpu()
            except (Exception, SystemExit) as error:
                warn("C++ kernels", error)
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

    return {"ext_modules": [cuda or cpu], "cmdclass": {"build_ext": BuildOrSkip}}


try:
    arguments = native_build()
except Exception as error:
    warn("C++ kernels", f"torch's extension builder is not usable ({error})")
    arguments = {}
setup(**arguments)
