"""Installs the package into a fresh environment of every Python there is, with the tested versions, and runs the fast tests.

pip install nox && nox               # Pythons that are missing are skipped, and nox says so
nox -s resolve                       # only whether everything could be installed
nox -s base                          # what works without the extras
"""

import nox

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]

nox.options.sessions = ["tests"]
nox.options.error_on_missing_interpreters = False


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The fast tests in a fresh environment."""
    session.install("--constraint", "constraints.txt", ".[dev]")
    session.run("python", "-m", "pytest", "-m", "not slow", *session.posargs)


@nox.session(python=PYTHONS)
def base(session: nox.Session) -> None:
    """What works without any extra."""
    session.run("python", "benchmarks/base_install.py")


@nox.session(python=PYTHONS)
def resolve(session: nox.Session) -> None:
    """Whether the tested versions exist as wheels for each Python and fit together; PyTorch's are its small builds for CPUs."""
    index = ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]
    wheels = ["--only-binary", ":all:", "--no-binary", "tensorrt-rtx"]  # which is the list of its parts, and no wheel
    session.run("pip", "install", "--dry-run", "--quiet", *wheels, "--constraint", "constraints.txt", *index, ".[dev]")
