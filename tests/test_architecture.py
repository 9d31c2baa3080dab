"""House rules that no eye checks reliably: who imports whom and how long things are.

Each rule is a function of a folder that returns what breaks it. It runs on the package and, to see that it
can fail, on small made-up packages.
"""

from __future__ import annotations

import ast
import re
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pyro_affine

FLOORS = {  # files of one floor do not know each other
    "cache conditioners convolutions partition precision": -1,
    "transform masks scales bounded_input conv_net linear_maps steps": 0,
    "pareto verdict weighted traces inference_data health_report neutra_result uniformity": 0,
    "checkpoint progress random_state fit_result step_size stopping task trained_weights weight_decay parameters": 0,
    "gaussian warped_model known_classes data_encoder latent_layout normal regression student summaries stored_rows": 0,
    "early_dropout": 0,
    "foreign coupling actnorm invertible_linear linear low_rank passes tails whitening curves correlations": 1,
    "network_step reshape images memory": 1,
    "distributed replay psis_result batches recovery blueprint saved_guide pathfinder support_check": 1,
    "coupling_step layer_steps mixing_step draws particles plots serialize stored_batches draws_on_disk": 2,
    "fused latent_density simulations training compiled density_data": 3,
    "compose density_task recorded warm_start": 4,
    "audit fit_density gradients image_flows normalizing_flow": 5,
    "flows diagnostics latent_elbo": 6,
    "columns export guides guide_task health amortised_density": 7,
    "amortised_posterior conditional_guide fit neutra": 8,
    "simulate truncated_prior": 9,
    "calibration rounds": 10,
}
FLOOR_OF = {name: floor for names, floor in FLOORS.items() for name in names.split()}
FREE = ("__init__", "__main__")  # these may import from every floor
IMPORTED_LATE = ("arviz", "matplotlib", "pandas", "pyarrow", "tqdm")  # slow to import, needed by few functions
CATCH_ALL = ("utils", "util", "helpers", "misc")
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 40

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(pyro_affine.__file__).resolve().parent

Rule = Callable[[Path], list[str]]


def imports_not_from_below(package: Path) -> list[str]:
    problems = []
    for name, tree in _modules(package):
        if name in FREE:
            continue
        if name not in FLOOR_OF:
            problems.append(f"{name}.py stands on no floor: add it to FLOORS in tests/test_architecture.py")
            continue
        for line, target in _own_imports(tree):
            if target in FLOOR_OF and FLOOR_OF[target] >= FLOOR_OF[name]:
                floors = f"floor {FLOOR_OF[name]}, imports {target}.py, floor {FLOOR_OF[target]}"
                problems.append(f"{name}.py:{line}, {floors}")
            elif not (package / f"{target}.py").exists() and target not in FLOOR_OF:
                problems.append(f"{name}.py:{line} imports {target!r}: import from the file that defines it")
    return problems


def _modules(package: Path) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(package.glob("*.py")):
        yield path.stem, ast.parse(path.read_text(encoding="utf-8"))


def _own_imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and file name of each import from the package, at the top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["pyro_affine" if node.level else "", node.module]))
            # "from pyro_affine import masks" names the file last, "from pyro_affine.masks import f" does not
            names = [f"{module}.{alias.name}" for alias in node.names]
            dotted = names if module == "pyro_affine" else [module]
        else:
            continue
        for name in dotted:
            package, _, rest = name.partition(".")
            if package == "pyro_affine":
                yield node.lineno, rest.partition(".")[0]


def early_imports(package: Path) -> list[str]:
    problems = []
    for name, tree in _modules(package):
        for node in tree.body:
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            slow = {module.partition(".")[0] for module in imported} & set(IMPORTED_LATE)
            problems += [f"{name}.py:{node.lineno} imports {top} at the top, not in a function" for top in slow]
    return problems


def star_imports(package: Path) -> list[str]:
    return [
        f"{name}.py:{node.lineno} has a star import"
        for name, tree in _modules(package)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    ]


def asserts(package: Path) -> list[str]:
    return [
        f"{name}.py:{node.lineno} has an assert, which python -O drops: raise an error with words"
        for name, tree in _modules(package)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
    ]


def tensors_on_import(package: Path) -> list[str]:
    makers = {f"torch.{name}" for name in ("tensor", "as_tensor", "zeros", "ones", "full", "eye", "arange", "linspace")}
    return [
        f"{name}.py:{node.lineno} makes a tensor when it is imported, which stays on the device of that moment"
        for name, tree in _modules(package)
        for statement in tree.body
        if not isinstance(statement, (ast.FunctionDef, ast.ClassDef))
        for node in ast.walk(statement)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in makers
    ]


def misplaced_files(package: Path) -> list[str]:
    files = sorted(package.rglob("*.py"))
    nested = [f"{path.name}: the package is flat" for path in files if path.parent != package]
    return nested + [f"{path.name}: name the idea" for path in files if path.stem.strip("_") in CATCH_ALL]


def long_files(package: Path) -> list[str]:
    lengths = {p.name: len(p.read_text(encoding="utf-8").splitlines()) for p in sorted(package.glob("*.py"))}
    too_long = {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES}
    return [f"{name} has {lines} lines, at most {MAX_FILE_LINES}" for name, lines in too_long.items()]


def long_functions(package: Path) -> list[str]:
    problems = []
    for name, tree in _modules(package):
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = _length(node) - (_length(node.body[0]) if ast.get_docstring(node) else 0)
                if lines > MAX_FUNCTION_LINES:
                    problems.append(f"{name}.py: {node.name} has {lines} lines, at most {MAX_FUNCTION_LINES}")
    return problems


def _length(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def undocumented(package: Path) -> list[str]:
    public = _public_names(package)
    return [
        f"{name}.py: {node.name} is public and has no docstring"
        for name, tree in _modules(package)
        for node in tree.body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name in public
        if ast.get_docstring(node) is None
    ]


def _public_names(package: Path) -> list[str]:
    for node in ast.parse((package / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError("__init__.py has no __all__ = [...]: write the public names there, as a literal")


def test_public_names_can_be_imported() -> None:
    assert missing_names(pyro_affine) == []
    assert sorted(pyro_affine.__all__) == sorted(_public_names(PACKAGE))


def missing_names(module: types.ModuleType) -> list[str]:
    twice = {name for name in module.__all__ if module.__all__.count(name) > 1}
    return [name for name in module.__all__ if not hasattr(module, name)] + sorted(twice)


def machine_paths(root: Path) -> list[str]:
    """Lines that name the folder of this checkout, the one above, a home, a temporary folder or a Python."""
    places = {ROOT, ROOT.parent, Path.home(), Path(tempfile.gettempdir()), Path(sys.prefix)}
    named = "|".join(re.escape(str(place)) for place in places if len(place.parts) > 1)
    pattern = re.compile(rf"(?<![\w.~-])(?:{named})(?![\w-])|(?<![\w.~-])/(?:home|root|Users)/\w")
    return [
        f"{path.relative_to(root)}:{number} names a path of one machine"
        for path in _texts(root)
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]


def _texts(root: Path) -> Iterator[Path]:
    suffixes = (".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".cff", ".ipynb", "")
    folders = [root / name for name in ("pyro_affine", "tests", "examples", "docs", ".github", ".ci")]
    files = [path for folder in folders if folder.is_dir() for path in sorted(folder.rglob("*"))]
    for path in [*sorted(root.iterdir()), *files]:
        built = {"__pycache__", "_build", "build", ".coverage"} & set(path.relative_to(root).parts)
        if path.is_file() and path.suffix in suffixes and not built:
            yield path


RULES: dict[str, tuple[Rule, Path]] = {
    "files import from lower floors only": (imports_not_from_below, PACKAGE),
    "slow packages are imported late": (early_imports, PACKAGE),
    "no star import": (star_imports, PACKAGE),
    "no assert in the package": (asserts, PACKAGE),
    "no tensor is made on import": (tensors_on_import, PACKAGE),
    "package is flat and has no catch all": (misplaced_files, PACKAGE),
    "files are short": (long_files, PACKAGE),
    "functions are short": (long_functions, PACKAGE),
    "public names have docstrings": (undocumented, PACKAGE),
    "no path of one machine": (machine_paths, ROOT),
}


@pytest.mark.parametrize(("rule", "folder"), RULES.values(), ids=RULES)
def test_package_keeps(rule: Rule, folder: Path) -> None:
    problems = rule(folder)
    assert not problems, "\n".join(problems)


BROKEN: dict[str, tuple[Rule, dict[str, str]]] = {
    "upward": (imports_not_from_below, {"masks.py": "from pyro_affine.flows import real_nvp"}),
    "same floor": (imports_not_from_below, {"masks.py": "import pyro_affine.scales"}),
    "upward, relative": (imports_not_from_below, {"masks.py": "from .flows import real_nvp"}),
    "upward, a file by name": (imports_not_from_below, {"masks.py": "from . import flows"}),
    "upward, in a function": (
        imports_not_from_below,
        {"masks.py": "def f():\n    from pyro_affine import flows"},
    ),
    "from the package": (imports_not_from_below, {"guides.py": "from pyro_affine import real_nvp"}),
    "the package": (imports_not_from_below, {"guides.py": "import pyro_affine"}),
    "unknown file": (imports_not_from_below, {"stranger.py": ""}),
    "slow import": (early_imports, {"plots.py": "import matplotlib.pyplot as plt"}),
    "slow from-import": (early_imports, {"plots.py": "from arviz import summary"}),
    "star import": (star_imports, {"masks.py": "from torch import *"}),
    "assert": (asserts, {"masks.py": "def f(x):\n    assert x"}),
    "tensor": (tensors_on_import, {"masks.py": "ONE = torch.tensor(1.0)"}),
    "utils": (misplaced_files, {"utils.py": ""}),
    "nested": (misplaced_files, {"layers/masks.py": ""}),
    "long file": (long_files, {"masks.py": "x = 1\n" * (MAX_FILE_LINES + 1)}),
    "long function": (long_functions, {"masks.py": "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES}),
    "long method": (
        long_functions,
        {"masks.py": "class A:\n  def f(self):\n" + "    x = 1\n" * MAX_FUNCTION_LINES},
    ),
    "function without docstring": (
        undocumented,
        {"__init__.py": "__all__ = ['f']", "masks.py": "def f(): ..."},
    ),
    "class without docstring": (undocumented, {"__init__.py": "__all__ = ['A']", "masks.py": "class A: ..."}),
    "home": (machine_paths, {"masks.py": f"# see {Path.home() / 'notes'}"}),
    "another's home": (machine_paths, {"masks.py": "# see /" + "home/me"}),
    "this checkout": (machine_paths, {"masks.py": f"path = '{ROOT}'"}),
}

KEPT: dict[str, tuple[Rule, dict[str, str]]] = {
    "downward": (
        imports_not_from_below,
        {"flows.py": "from pyro_affine.masks import half_mask\nimport torch"},
    ),
    "free files": (
        imports_not_from_below,
        {"__main__.py": "import pyro_affine\nfrom pyro_affine import fit"},
    ),
    "late import": (early_imports, {"plots.py": "import torch\ndef f():\n    import matplotlib"}),
    "tensor in a function": (tensors_on_import, {"masks.py": "def f():\n    return torch.tensor(1.0)"}),
    "full file": (long_files, {"masks.py": "x = 1\n" * MAX_FILE_LINES}),
    "long docstring": (
        long_functions,
        {"masks.py": 'def f():\n    """' + "word\n" * 99 + '    """\n    return 1'},
    ),
    "private": (undocumented, {"__init__.py": "__all__ = ['f']", "masks.py": "def _f(): ...\ndef g(): ..."}),
    "other paths": (machine_paths, {"masks.py": "# ../shared/data, https://x.org/home/me, docs/rooted/a"}),
}


def _package(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / "pyro_affine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder / "pyro_affine"


@pytest.mark.parametrize(("rule", "files"), BROKEN.values(), ids=BROKEN)
def test_rule_sees_what_breaks_it(rule: Rule, files: dict[str, str], tmp_path: Path) -> None:
    package = _package(tmp_path, files)
    assert len(rule(tmp_path if rule is machine_paths else package)) == 1


@pytest.mark.parametrize(("rule", "files"), KEPT.values(), ids=KEPT)
def test_rule_leaves_the_rest_alone(rule: Rule, files: dict[str, str], tmp_path: Path) -> None:
    package = _package(tmp_path, files)
    assert rule(tmp_path if rule is machine_paths else package) == []


def test_missing_and_repeated_public_names_are_seen() -> None:
    module = types.ModuleType("made_up")
    module.__all__ = ["gone", "here", "here"]
    module.here = 1
    assert missing_names(module) == ["gone", "here"]
