import ast
import re
from pathlib import Path

import pytest

from moeconv.recipe_file import load_shipped

PACKAGE = Path(__file__).parent.parent / "moeconv"
PATHS = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
MODULES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in PATHS.items()}

#: The flow of the design: a module imports only what stands before it.
ORDER = [
    "__init__", "errors", "files", "device", "tensors", "dims", "names", "ops", "yamldoc", "recipe", "recipe_file",
    "header", "formats.strips", "formats.format", "formats.mx", "formats.rows", "formats.fp8", "formats.fp4",
    "formats.columns", "formats.bnb4", "formats.llm_int8", "formats.integers", "formats.probe", "formats.rounding",
    "formats", "checkpoint", "small_tensors", "states", "targets", "encoded", "config_json", "forms", "units",
    "suspects", "layouts", "moves", "unpacked", "steps", "tiles", "tasks", "engines", "scheme", "values", "choices",
    "shards", "plan", "losses", "origin", "budget", "transcodes", "joined", "fused", "quantize", "relayout", "explain",
    "manifest", "selection", "transcoder", "worker", "journal", "pool", "random_writes", "destination", "consumption",
    "writer", "executor", "sample", "looking", "claims", "matching", "structure", "soundness", "comparison",
    "likeness", "diagnosis", "report", "verify", "inspect", "discover", "drafts", "propose", "sizing", "target",
    "progress", "options", "process", "commands", "cli_layouts", "cli_quantize", "cli", "__main__", "transformers",
]  # fmt: skip


class _Imports(ast.NodeVisitor):
    """Modules of moeconv that a module imports, wherever in it, but not for type checking alone."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("moeconv.")}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, "imports are absolute"
        if node.module == "moeconv":
            self.found |= {alias.name if alias.name in MODULES else "__init__" for alias in node.names}
        elif node.module and node.module.startswith("moeconv."):
            self.found.add(node.module.partition(".")[2])


def imports_of(module: str) -> set[str]:
    visitor = _Imports()
    visitor.visit(MODULES[module])
    return visitor.found


def calls_in(module: str) -> set[str]:
    """Names that are called: `print` for `print(...)`, `Thread` for `threading.Thread(...)`."""
    functions = [node.func for node in ast.walk(MODULES[module]) if isinstance(node, ast.Call)]
    names = {function.id for function in functions if isinstance(function, ast.Name)}
    return names | {function.attr for function in functions if isinstance(function, ast.Attribute)}


def test_every_module_has_its_place_in_the_order() -> None:
    assert set(ORDER) == set(MODULES)
    assert imports_of("plan") > {"units", "layouts", "steps"}  # the reader of imports works


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_stands_before_it(module: str) -> None:
    before = set(ORDER[: ORDER.index(module)])
    assert imports_of(module) <= before


PRINTING = {"cli", "cli_quantize", "commands", "process", "progress"}


def test_only_the_command_line_prints() -> None:
    assert {module for module in MODULES if "print" in calls_in(module)} == PRINTING
    writes = {module for module, tree in MODULES.items() if re.search(r"std(out|err)", ast.unparse(tree))}
    assert writes <= PRINTING


def test_only_executor_and_tiles_start_threads_and_the_pool_processes() -> None:
    starters = {"Thread", "ThreadPoolExecutor", "ProcessPoolExecutor", "Process", "Popen", "fork"}
    assert {module for module in MODULES if starters & calls_in(module)} == {"executor", "looking", "pool"}
    assert "fork" in calls_in("pool")


def test_only_files_touches_the_disk() -> None:
    """process opens only /dev/null, pool only pipes; recipes are read where they are parsed."""
    doors: dict[str, set[str]] = {}
    for module, tree in MODULES.items():
        functions = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        doors[module] = {name for name in functions if re.match(r"open$|os\.(?!path|cpu_count|_exit)|shutil\.", name)}
    assert {module for module, used in doors.items() if used} == {"files", "process", "pool"}
    processes = {"os.fork", "os.getpid", "os.getppid", "os.kill", "os.waitpid"}
    assert doors["pool"] == {"os.pipe", "os.fdopen", "os.close"} | processes
    assert doors["process"] == {"os.open", "os.dup2"}


def test_no_model_family_is_named_in_python() -> None:
    families = {model_type for recipe in load_shipped() for model_type in recipe.model_types}
    assert len(families) > 10
    for module in MODULES:
        words = set(re.findall(r"\w+", PATHS[module].read_text(encoding="utf-8").lower()))
        assert not families & words, module


def test_no_module_is_a_drawer_for_everything() -> None:
    assert not {"utils", "util", "helpers", "helper", "common", "base", "manager", "misc", "core"} & set(MODULES)


def public(tree: ast.Module) -> list[ast.ClassDef | ast.FunctionDef]:
    nodes = [node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    return [node for node in nodes if not node.name.startswith("_")]


@pytest.mark.parametrize("module", MODULES)
def test_all_that_is_public_has_a_docstring(module: str) -> None:
    assert ast.get_docstring(MODULES[module])
    assert not [node.name for node in public(MODULES[module]) if not ast.get_docstring(node)]


@pytest.mark.parametrize("module", MODULES)
def test_a_file_is_read_in_one_sitting(module: str) -> None:
    assert PATHS[module].read_text(encoding="utf-8").count("\n") <= 500
    functions = [node for node in ast.walk(MODULES[module]) if isinstance(node, ast.FunctionDef)]
    assert not [node.name for node in functions if (node.end_lineno or 0) - node.lineno > 70]


def test_every_error_that_is_raised_has_a_remedy() -> None:
    """`SomeError(message, remedy)`: two arguments, of which neither is empty."""
    errors = {node.name for node in public(MODULES["errors"]) if isinstance(node, ast.ClassDef)} - {"MoeconvError"}
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in errors:
                assert len(node.args) == 2, f"{module}.py:{node.lineno}"
                assert not [arg for arg in node.args if isinstance(arg, ast.Constant) and not arg.value]
