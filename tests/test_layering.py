"""The arrows between the rooms of the house, read from the import statements of every file, those inside functions included."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.relative_to(ROOT).as_posix() for package in ("txl_train", "txl_deploy") for path in (ROOT / package).rglob("*.py"))

CORNERS = {
    "click": ("txl_deploy/cli/",),
    "onnx": ("txl_deploy/export/", "txl_deploy/cli/inspect.py", "txl_deploy/parity/mutations.py", "txl_deploy/parity/mutants/"),
    "onnxscript": ("txl_deploy/export/",),
    "polygraphy": ("txl_deploy/parity/layers.py",),
    "onnxruntime": ("txl_deploy/runtimes/onnxrt.py",),
    "sacremoses": ("txl_train/data/tokenizers.py", "txl_train/data/detokenizers.py", "txl_train/protocols.py"),
    "tiktoken": ("txl_train/data/bpe.py",),
    "matplotlib": tuple(f"txl_deploy/bench/{name}.py" for name in ("plots", "plots_bench", "plots_parity", "plots_training")),
    "jinja2": ("txl_deploy/bench/report/page.py",),
    "yaml": ("txl_train/settings.py", "txl_deploy/compat.py"),
    "rich": ("txl_deploy/cli/", "txl_train/callbacks.py"),
    "triton": (
        "txl_train/trial_kernel.py",
        "txl_train/model/layer_kernels.py",
        "txl_train/model/softmax_kernels.py",
        "txl_train/optim/lamb_kernels.py",
    ),
    "tensorrt": (),
    "tensorrt_rtx": (),
}
"""The only places that import a package."""

WITHOUT_TORCH = (
    "txl_train/errors.py",
    "txl_train/config.py",
    "txl_train/settings.py",
    "txl_train/metrics.py",
    "txl_train/files.py",
    "txl_train/unfinished.py",
    "txl_train/exhaustion.py",
    "txl_train/data/",
    "txl_deploy/documents.py",
    "txl_deploy/bootstrap.py",
    "txl_deploy/distributions.py",
    "txl_deploy/manifest.py",
    "txl_deploy/receipt.py",
    "txl_deploy/claims.py",
    "txl_deploy/doctor.py",
    "txl_deploy/compat.py",
    "txl_deploy/trt/cuda.py",
    "txl_deploy/trt/kit_build.py",
    "txl_deploy/bench/environment.py",
    "txl_deploy/bench/stats.py",
    "txl_deploy/bench/harness.py",
    "txl_deploy/bench/energy.py",
    "txl_deploy/bench/verdict.py",
)
"""What works where PyTorch is missing, or must start at once."""

CONTRACTS = (
    "txl_deploy.bench",
    "txl_deploy.bootstrap",
    "txl_deploy.distributions",
    "txl_deploy.runtimes.base",
    "txl_deploy.parity.tolerances",
    "txl_train.errors",
    "txl_train.metrics",
)
"""What the clock and the statistics may know of us."""

STANDARD_LIBRARY_AND_NUMPY = (
    "txl_deploy/bootstrap.py",
    "txl_deploy/distributions.py",
    "txl_deploy/bench/stats.py",
    "txl_deploy/bench/stability.py",
    "txl_deploy/bench/harness.py",
    "txl_deploy/bench/environment.py",
)

LOWER = {
    "txl_train/errors.py": (),
    "txl_train/config.py": ("txl_train.errors",),
    "txl_train/unfinished.py": (),
    "txl_train/exhaustion.py": ("txl_train.errors",),
    "txl_train/files.py": ("txl_train.errors", "txl_train.unfinished"),
    "txl_train/metrics.py": ("txl_train.errors",),
    "txl_train/data/": (
        "txl_train.data",
        "txl_train.errors",
        "txl_train.config",
        "txl_train.files",
        "txl_train.unfinished",
        "txl_train.exhaustion",
    ),
    "txl_train/model/": ("txl_train.model", "txl_train.errors", "txl_train.config", "txl_train.metrics", "txl_train.cuda_graphs"),
    "txl_train/cuda_graphs.py": (),
    "txl_train/optim/": ("txl_train.optim", "txl_train.errors", "txl_train.config", "txl_train.gpu_kernels"),
    "txl_train/gpu_kernels.py": ("txl_train.trial_kernel",),
    "txl_train/interop/": (
        "txl_train.interop",
        "txl_train.checkpoint",
        "txl_train.model",
        "txl_train.data",
        "txl_train.metrics",
        "txl_train.config",
        "txl_train.files",
        "txl_train.errors",
    ),
    "txl_deploy/documents.py": ("txl_train.errors",),
    "txl_deploy/bootstrap.py": ("txl_deploy.distributions",),
    "txl_deploy/distributions.py": (),
    "txl_deploy/manifest.py": ("txl_deploy.documents", "txl_train.errors", "txl_train.config", "txl_train.files"),
    "txl_deploy/receipt.py": (
        "txl_deploy.documents",
        "txl_deploy.bootstrap",
        "txl_deploy.manifest",
        "txl_deploy.parity.tolerances",
        "txl_deploy.runtimes.base",
        "txl_train.metrics",
        "txl_train.errors",
        "txl_train.files",
    ),
    "txl_deploy/compat.py": ("txl_train.errors", "txl_deploy.trt.cuda"),
    "txl_deploy/trt/cuda.py": (),
    "txl_deploy/trt/kit_build.py": (),
    "txl_deploy/signature.py": ("txl_train.errors", "txl_train.config", "txl_train.model"),
}
"""What the lower rooms may import of the two packages; rooms that are not listed are held by the rules on whole packages."""


def imported_modules(source: str) -> set[str]:
    """Return the dotted names that a file imports anywhere; `from a import b` counts as `a.b`, which may be a module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports_of(file: str) -> set[str]:
    return imported_modules((ROOT / file).read_text(encoding="utf-8"))


def top_level_imports_of(file: str) -> set[str]:
    """Return what is imported when the file itself is imported: not within functions, and not for type checkers alone."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    kept = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return imported_modules(ast.unparse(ast.Module(body=kept, type_ignores=[])))


def within(file: str, places: Iterable[str]) -> bool:
    return any(file == place or (place.endswith("/") and file.startswith(place)) for place in places)


def of_package(modules: Iterable[str], package: str) -> set[str]:
    return {module for module in modules if module == package or module.startswith(f"{package}.")}


def test_there_is_something_to_read() -> None:
    assert {"txl_train/errors.py", "txl_deploy/cli/main.py"} <= set(FILES)


def test_every_folder_of_code_is_a_package() -> None:
    for file in FILES:
        assert (ROOT / file).with_name("__init__.py").exists(), f"{file} lies in no package and would be missing from the wheel"


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("txl_train/")])
def test_training_knows_nothing_of_deployment(file: str) -> None:
    assert not of_package(imports_of(file), "txl_deploy")


@pytest.mark.parametrize("package", CORNERS)
def test_a_heavy_package_is_imported_in_its_corner_only(package: str) -> None:
    strays = {file for file in FILES if of_package(imports_of(file), package) and not within(file, CORNERS[package])}
    assert strays == set()


@pytest.mark.parametrize("file", [file for file in FILES if within(file, WITHOUT_TORCH)])
def test_what_needs_no_torch_imports_none(file: str) -> None:
    assert not of_package(imports_of(file), "torch")


@pytest.mark.parametrize("file", [file for file in FILES if within(file, STANDARD_LIBRARY_AND_NUMPY)])
def test_the_clock_and_the_statistics_need_numpy_alone(file: str) -> None:
    allowed = {*sys.stdlib_module_names, "numpy", "txl_train", "txl_deploy"}
    assert {module.partition(".")[0] for module in imports_of(file)} <= allowed
    ours = of_package(imports_of(file), "txl_deploy") | of_package(imports_of(file), "txl_train")
    assert {module for module in ours if not any(of_package([module], contract) for contract in CONTRACTS)} == set()


@pytest.mark.parametrize("place", LOWER)
def test_a_lower_room_imports_nothing_from_above(place: str) -> None:
    for file in FILES:
        if within(file, [place]):
            imports = imports_of(file)
            ours = of_package(imports, "txl_train") | of_package(imports, "txl_deploy")
            above = {
                module for module in ours if module != "txl_train" and not any(of_package([module], allowed) for allowed in LOWER[place])
            }
            assert above == set(), f"{file} imports {above}"


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("txl_deploy/cli/")])
def test_nothing_below_imports_the_command_line(file: str) -> None:
    assert not of_package(imports_of(file), "txl_deploy.cli")


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("txl_deploy/cli/")])
def test_a_command_imports_heavy_packages_when_it_is_called(file: str) -> None:
    heavy = {"torch", "numpy", "onnx", "onnxruntime", "matplotlib", "rich", "yaml", "sacremoses", "tiktoken"}
    assert not {module for module in top_level_imports_of(file) if module.partition(".")[0] in heavy}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import txl_deploy", {"txl_deploy"}),
        ("def f():\n    from onnx import helper as h", {"onnx.helper"}),
        ("try:\n    import a.b as c, d\nexcept ImportError:\n    pass", {"a.b", "d"}),
    ],
)
def test_the_reader_of_imports_sees_them_wherever_they_stand(source: str, expected: set[str]) -> None:
    assert imported_modules(source) == expected
