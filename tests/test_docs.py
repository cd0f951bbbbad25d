"""The documentation runs: docstring examples, and every Python block of README.md."""

from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path

import pytest

import fastcl

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
FUNCTIONS = [name for name in fastcl.__all__ if inspect.isfunction(getattr(fastcl, name))]
LOSSES = [name for name in FUNCTIONS if name.endswith(("_loss", "_xent", "_nce", "_views"))]
# What keeps rows between batches, and the result of a function.
OTHERS = ("Queue", "MemoryBank", "ContrastiveStats")
MODULES = [name for name in fastcl.__all__ if isinstance(getattr(fastcl, name), type) and name not in OTHERS]
# A list of views and no more: a loop in the caller's code says as much as a module would.
WITHOUT_MODULE = ("nt_xent_views",)


def documentation(name: str) -> str:
    return inspect.getdoc(getattr(fastcl, name)) or ""


@pytest.mark.parametrize("name", fastcl.__all__)
def test_examples_in_docstrings(name):
    value = getattr(fastcl, name)
    examples = doctest.DocTestFinder(recurse=False).find(value, name, globs={})
    assert sum(len(example.examples) for example in examples) >= 3, f"{name} has no example to copy"
    output = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for example in examples:
        runner.run(example, out=output.append)
    assert not runner.failures, "".join(output)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_say_what_they_compute_take_and_raise(name):
    text = documentation(name)
    for section in ("Args:", "Returns:", "Raises:", "Example:"):
        assert section in text, f"{name}: no {section}"
    raised = text.split("Raises:")[1]
    assert "TypeError" in raised and "ValueError" in raised, name
    assert re.search(r"\[([A-Z0-9]+|\.\.\.)(, [A-Z0-9]+)+\]", text), f"{name}: no shape"
    assert "NaN" in text, name


@pytest.mark.parametrize("name", LOSSES)
def test_losses_have_a_formula_and_say_how_ranks_share_them(name):
    text = documentation(name)
    assert re.search(r"^L = .*(log|sum|mean)", text, re.MULTILINE), f"{name}: no formula"
    assert "group" in text and "over ranks" in text, name


def test_every_loss_has_its_module():
    """And nothing else has one."""
    pointed_at = {word for name in MODULES for word in re.findall(r"`(\w+)`", documentation(name))}
    expected = set(LOSSES) - set(WITHOUT_MODULE)
    assert pointed_at & set(FUNCTIONS) == expected and len(MODULES) == len(expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_is_described(name):
    described = re.search(r"Args:\n(.*?)\n\S", documentation(name), re.DOTALL).group(1)
    listed = re.findall(r"^ {4}(\w[\w, ]*):", described, re.MULTILINE)
    assert [word for entry in listed for word in entry.split(", ")] == list(
        inspect.signature(getattr(fastcl, name)).parameters
    )


@pytest.mark.parametrize("name", MODULES)
def test_modules_point_at_their_function(name):
    """The function holds the documentation; what the module adds is described in the module."""
    text, parameters = documentation(name), inspect.signature(getattr(fastcl, name)).parameters
    (function,) = {word for word in re.findall(r"`(\w+)`", text) if word in FUNCTIONS}
    shared = inspect.signature(getattr(fastcl, function)).parameters
    for parameter, definition in parameters.items():
        if parameter in shared:
            assert definition.default == shared[parameter].default, f"{name}: other default of {parameter}"
            assert definition.kind == shared[parameter].kind or parameter == "temperature", parameter
        else:
            assert parameter in text, f"{name} does not describe {parameter}"


def test_readme_blocks(tmp_path, monkeypatch):
    """In order, in one namespace, as a reader would type them."""
    text = README.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    blocks = list(BLOCK.finditer(text))
    assert blocks, "README.md shows no Python"
    namespace = {"__name__": "__main__"}
    for block in blocks:
        # Empty lines in front, so that a traceback names the line of README.md.
        source = "\n" * text.count("\n", 0, block.start(1)) + block.group(1)
        exec(compile(source, str(README), "exec"), namespace)
    assert "nt_xent" in namespace


@pytest.mark.parametrize("name", fastcl.__all__)
def test_readme_names_it(name):
    assert name in README.read_text(encoding="utf-8")


INCLUDED = re.compile(r"<!-- (\S+) -->\n\n(.*?)\n<!-- end -->", re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/trainer.md"])
def test_figures_come_from_result_files(page):
    """Every table of figures is, to the letter, a committed result file."""
    included = INCLUDED.findall((README.parent / page).read_text(encoding="utf-8"))
    assert included, f"{page} includes no result file"
    for path, text in included:
        assert text == (README.parent / path).read_text(encoding="utf-8"), f"{page} and {path} differ"
