"""What all tests share: the order of files, one thread for PyTorch, no deadlines, Ctrl-C, where recorded results of the reference lie."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
_LEVELS = {
    logger: logger.level for logger in map(logging.getLogger, ("", "txl_train", "txl_deploy", "py.warnings", "torch.onnx._internal"))
}
"""As they are before any command has run."""

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what tests start, too

if importlib.util.find_spec("hypothesis") is not None:
    import hypothesis

    hypothesis.settings.register_profile("txl", deadline=None)  # the first example may import something, and the machine may be busy
    hypothesis.settings.load_profile("txl")

if importlib.util.find_spec("torch") is not None:
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: without a GPU its kernels run in its interpreter


def pytest_configure(config: pytest.Config) -> None:
    """Keep pytest-xdist from putting files of few tests last: some of these are the longest."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that no worker is left with one at the end: whole scripts, then those of most slow tests."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (not (slow[item.path] and item.path.parent == TESTS), -slow[item.path]))


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """Keep PyTorch on one thread: tests run side by side, and sums keep one order."""
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_works() -> None:
    """Undo what a shell does to jobs in the background, continuous integration among them: it lets them ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _log_levels_of_its_own() -> Iterator[None]:
    """Undo what a command sets with `-q` or `-v`: the tests of one process share the loggers. Before a test too, as fixtures of a whole
    session run commands before this."""
    _reset_levels()
    yield
    _reset_levels()


def _reset_levels() -> None:
    for logger, level in _LEVELS.items():
        logger.setLevel(level)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder of shared material: the environment variable TXL_SHARED_DIR, or ../shared beside the repository; else skip."""
    folder = Path(os.environ.get("TXL_SHARED_DIR") or Path(__file__).resolve().parents[1].parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"needs the shared material: no folder {folder} (set TXL_SHARED_DIR)")
    return folder


@pytest.fixture(scope="session")
def reference_cases(shared_dir: Path) -> Path:
    """Folder of checkpoints, texts and results that NVIDIA's own code computed; else skip."""
    folder = shared_dir / "reference-cases"
    if not folder.is_dir():
        pytest.skip(f"needs the reference's recorded results: no folder {folder}")
    return folder
