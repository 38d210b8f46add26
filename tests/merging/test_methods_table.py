"""`cuvee methods` and docs/methods.md: everything in the registry, as it is there."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from merging import methods, methods_table
from merging.errors import CuveeError
from merging.methods import REQUIRED, Method
from tests.commands import run

DOCS = Path(__file__).parents[2] / "docs"
BUILT_IN = {name: m for name, m in methods.METHODS.items() if m.function.__module__.startswith("merging.methods")}


def printed(name: str | None = None, width: int = 100) -> str:
    stream = io.StringIO()
    methods_table.show(name, Console(file=stream, width=width, highlight=False))
    return stream.getvalue()


def test_docs_are_up_to_date() -> None:
    """If not: cuvee methods --markdown > docs/methods.md"""
    assert (DOCS / "methods.md").read_text(encoding="utf-8") == methods_table.markdown()


@pytest.mark.parametrize("width", [80, 100, 150])
def test_every_method_with_its_parameters_and_defaults(width: int) -> None:
    text = printed(width=width)
    assert max(map(len, text.splitlines())) <= width
    for method in BUILT_IN.values():
        assert f"\n{method.name} " in text
        assert (method.title in text) == (width == 150)
    squeezed = " ".join(text.split())
    for each in ("weight*, density*=1, epsilon*=0.15", "max_iter=10, tol=1e-5", "base + 2 or more", "(base +) 2 "):
        assert each in squeezed


@pytest.mark.parametrize("method", [pytest.param(method, id=name) for name, method in BUILT_IN.items()])
def test_one_method_in_full(method: Method) -> None:
    text = " ".join(printed(method.name, 500).split())
    assert method.title in text
    assert method.source in text
    assert method.summary in text
    for parameter in method.parameters.values():
        assert parameter.help, f"'{parameter.name}' of '{method.name}' says nothing of itself"
        assert parameter.help in text
        assert f"{parameter.name} " in text


def test_ranges_defaults_and_choices() -> None:
    text = printed("ties")
    assert "density" in text and "0 … 1, per model" in text
    assert "tensor or global" in text
    assert "required" in text
    assert "number ≥ 0" in printed("ram")
    assert "whole number ≥ 0" in printed("karcher")
    assert "no parameters" in printed("arcee_fusion")


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(CuveeError, match="did you mean 'ties'"):
        methods_table.show("tise")
    assert run("methods", "tise").code == 2


def test_command_and_its_json() -> None:
    assert "breadcrumbs_ties" in run("methods").out
    assert "ε" in run("methods", "della").out
    assert run("methods", "--markdown").out == methods_table.markdown()
    found = run("methods", "--json").json
    assert set(BUILT_IN) <= set(found["methods"])
    assert list(run("methods", "slerp", "--json").json["methods"]) == ["slerp"]
    for name, method in BUILT_IN.items():
        entry = found["methods"][name]
        assert entry["models"] == [method.min_models, method.max_models]
        for parameter in method.parameters.values():
            told = entry["parameters"][parameter.name]
            assert told["required"] == (parameter.default is REQUIRED)
            assert told["default"] == (None if parameter.default is REQUIRED else parameter.default)
    json.dumps(found)
