"""Builds the wheel and the sdist, installs the wheel where the source is not, and tests it there: ``make wheel-test``.

The environment that the wheel is installed in is new; its dependencies are those of the Python that runs this.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BESIDE = ["tests", "docs", "examples", "conftest.py", "pyproject.toml", "README.md"]  # what tests read
FAST = ["import", "main", "masks", "scales", "partition", "transform", "compose", "flows", "serialize", "saved_guide",
        "untrusted_files", "plots", "readme"]  # fmt: skip


def run(*command: str | Path, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{' '.join(map(str, command))} failed")
    return done.stdout


def build(folder: Path) -> Path:
    """The wheel; it holds the package and nothing else, and the sdist what its tests need."""
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    wheel, sdist = next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))
    print(run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist, cwd=folder))
    with zipfile.ZipFile(wheel) as packed:
        inside = [Path(name) for name in packed.namelist()]
    modules = {path.name for path in (ROOT / "pyro_affine").glob("*.py")} | {"py.typed"}
    assert {path.name for path in inside if path.parts[0] == "pyro_affine"} == modules
    assert all(path.parts[0] == "pyro_affine" or path.parts[0].endswith(".dist-info") for path in inside)
    with tarfile.open(sdist) as packed:
        shipped = {name.partition("/")[2] for name in packed.getnames()}
    assert {"conftest.py", "tests/cases.py", "pyro_affine/py.typed", "CHANGELOG.md"} <= shipped, shipped
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """Python of a new environment with the wheel."""
    run(sys.executable, "-m", "venv", folder, cwd=wheel.parent)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    ours = [
        path for path in sys.path if path.endswith("-packages")
    ]  # without an editable install, which is a .pth in it
    Path(packages, "dependencies.pth").write_text("\n".join(ours) + "\n")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel, cwd=folder)
    found = run(python, "-c", "import pyro_affine; print(pyro_affine.__file__, pyro_affine.__version__)", cwd=folder)
    assert found.split() == [str(Path(packages, "pyro_affine", "__init__.py")), wheel.name.split("-")[1]], found
    return python


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = install(build(folder), folder / "environment")
        for beside in map(ROOT.joinpath, BESIDE):
            copy = shutil.copytree if beside.is_dir() else shutil.copy
            copy(beside, folder / beside.name)
        print(run(python, "-m", "pyro_affine", "doctor", cwd=folder))
        tests = sys.argv[1:] or [f"tests/test_{name}.py" for name in FAST]
        print(run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=folder))


if __name__ == "__main__":
    main()
