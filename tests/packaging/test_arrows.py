"""Who may import whom: arrows run one way, and no two parts import each other."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# From the public face down. A module may import those of its own layer and of the layers below.
# A module's layer is that of its name, or else of its package.
LAYERS = (
    (
        *("__main__", "adam_cg", "adam_cm", "compat", "diagnostics", "gradient_release"),
        *("master_params", "param_groups", "sam"),
    ),
    ("_optimizer",),
    ("_backends",),
    ("_state", "reference"),
    (
        "_state.table",
        "_bucket",
        "_distributed",
        "_install",
        "philox",
        "rounding",
        "_warnings",
        "_works",
        "_devices",
    ),
)
BACKENDS = ("cm_fused._backends.cpu", "cm_fused._backends.eager", "cm_fused._backends.triton")
# Besides the backend that runs it, whoever chooses or traces it; `compat` takes first steps by it.
IMPORT_THE_REFERENCE = {
    "cm_fused._backends.eager",
    "cm_fused._backends.select",
    "cm_fused._backends.traced",
    "cm_fused.compat.cmoptimizer",
}


def _name(source: Path) -> str:
    return ".".join(source.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _sources(folder: str) -> dict[str, Path]:
    """Return a folder's Python files by the names of their modules."""
    return {_name(source): source for source in sorted((ROOT / folder).rglob("*.py"))}


MODULES = _sources("cm_fused")
TESTS = _sources("tests")
BENCHES = _sources("bench")
ALL = {*MODULES, *TESTS, *BENCHES}


def _imported(name: str, source: Path) -> Iterator[str]:
    """Yield the names that a file imports anywhere in it: of modules where they are some."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} must import by full names"
            module = node.module or ""
            for alias in node.names:
                full = f"{module}.{alias.name}"
                yield full if full in ALL else module


ARROWS = {name: set(_imported(name, source)) & set(MODULES) for name, source in MODULES.items()}


def _layer(name: str) -> int:
    layers = {f"cm_fused.{each}": i for i, names in enumerate(LAYERS) for each in names}
    layers["cm_fused"] = 0
    while name not in layers:
        name = name.rpartition(".")[0]
    return layers[name]


def _is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_no_cycle() -> None:
    """No module imports itself by way of others."""
    TopologicalSorter(ARROWS).prepare()


@pytest.mark.parametrize("name", MODULES)
def test_arrows_run_one_way(name: str) -> None:
    """Every module imports from its own layer and those below it."""
    assert [each for each in ARROWS[name] if _layer(each) < _layer(name)] == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_do_not_know_each_other(backend: str) -> None:
    """A backend imports no other one."""
    others = [other for other in BACKENDS if other != backend]
    own = [name for name in MODULES if _is_in(name, backend)]
    assert own
    for name in own:
        assert not [each for each in ARROWS[name] if any(_is_in(each, o) for o in others)], name


def test_few_know_the_reference() -> None:
    """The fused backends compute nothing by the reference."""
    found = {name for name, arrows in ARROWS.items() if "cm_fused.reference" in arrows}
    assert found == IMPORT_THE_REFERENCE


@pytest.mark.parametrize("name", TESTS)
def test_tests_share_support_alone(name: str) -> None:
    """Tests import of other tests' folders `tests.support`; of benches, those of `tests.bench`."""
    folder = name.rpartition(".")[0]
    imports = set(_imported(name, TESTS[name]))
    tests = {each for each in imports if _is_in(each, "tests")}
    allowed = (folder, "tests.support") if folder != "tests" else ("tests.support",)
    assert not {each for each in tests if not any(_is_in(each, of) for of in allowed)}
    if not _is_in(name, "tests.bench"):
        assert not {each for each in imports if _is_in(each, "bench")}


@pytest.mark.parametrize("name", BENCHES)
def test_benches_know_no_tests(name: str) -> None:
    """Benches are run where there are no tests."""
    assert not {each for each in _imported(name, BENCHES[name]) if _is_in(each, "tests")}
