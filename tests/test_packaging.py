"""The installed package: refusal of a foreign `_C`, the report, type marker, building without a compiler."""

import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastcl
from fastcl import _native, info

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(fastcl.__file__).parent
PRINT_NATIVE = "from fastcl import _native; print(_native.LOADED); print(_native.REASON)"


def run_python(code: str, path: Path, cwd: Path) -> str:
    env = os.environ | {"PYTHONPATH": str(path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def package_copy(tmp_path: Path) -> Path:
    """A directory with a copy of the package, its extension included where there is one."""
    shutil.copytree(PACKAGE, tmp_path / "site" / "fastcl", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "site"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (json.dumps({"torch": "0.0.1"}), "built for torch 0.0.1, running " + torch.__version__),
        ("{", "unreadable build record"),
        ("[]", "unreadable build record"),
        (json.dumps({"torch": torch.__version__}), "C++ extension not used"),
    ],
)
def test_unfit_extension_is_not_loaded(package_copy: Path, record: str, expected: str):
    # A file that is no library: importing it would raise, so the first three must stop before it.
    for library in (package_copy / "fastcl").glob("_C*"):
        library.unlink()
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (package_copy / "fastcl" / f"_C{suffix}").write_bytes(b"not a library")
    (package_copy / "fastcl" / "_C_build.json").write_text(record)
    loaded, reason = run_python(PRINT_NATIVE, package_copy, package_copy.parent).splitlines()
    assert loaded == "False"
    assert expected in reason


@pytest.mark.skipif(not _native.LOADED, reason=_native.REASON)
def test_older_extension_is_named(package_copy: Path):
    """Of the same torch, but built before the package had another op."""
    ops = package_copy / "fastcl" / "ops" / "__init__.py"
    ops.write_text(ops.read_text().replace('SCHEMAS = {\n', 'SCHEMAS = {\n    "newer_op": "(Tensor x) -> Tensor",\n'))
    code = "try:\n    import fastcl\nexcept ImportError as error:\n    print(error)"
    assert "lacks newer_op: build it again" in run_python(code, package_copy, package_copy.parent)


def test_missing_record_means_not_built(package_copy: Path):
    (package_copy / "fastcl" / "_C_build.json").unlink(missing_ok=True)
    loaded, reason = run_python(PRINT_NATIVE, package_copy, package_copy.parent).splitlines()
    assert loaded == "False"
    assert "not built" in reason


def test_native_state_is_consistent():
    assert _native.LOADED == bool(_native.build_info())
    assert _native.REASON and "\n" not in _native.REASON
    if _native.LOADED:
        assert torch.__version__.startswith(_native.build_info()["torch"])


def test_report_names_versions_and_backends():
    text = info.report()
    assert torch.__version__ in text
    assert _native.REASON in text
    done = subprocess.run([sys.executable, "-m", "fastcl.info"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == text


def test_type_marker_is_shipped():
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.slow
def test_install_without_compiler_works_from_any_directory(tmp_path: Path):
    source = tmp_path / "source"
    names = ["csrc", "fastcl", "setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"]
    for name in names:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "_C*")
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    (source / "README.md").touch()
    target = tmp_path / "target"
    tools = tmp_path / "bin"
    tools.mkdir()
    # Only the interpreter's directory is left, so that neither g++ nor c++ is found.
    env = os.environ | {"CC": "/nonexistent", "CXX": "/nonexistent", "PATH": f"{Path(sys.executable).parent}:{tools}"}
    command = [sys.executable, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps"]
    command += ["--target", str(target), str(source)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert output.count("warning: fastcl: building without C++ kernels") == 1, output
    assert not list((target / "fastcl").glob("_C*"))
    assert (target / "fastcl" / "py.typed").is_file()
    code = "import torch; from fastcl import nt_xent, _native; assert not _native.LOADED; x = torch.randn(8, 4);"
    out = run_python(code + "print(float(nt_xent(x, x + 1)))", target, tmp_path)
    assert float(out) > 0
