"""Reading text must be quick to start: no PyTorch, and sacremoses and tiktoken only where their rules are used."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import txl_train.data


def test_no_module_of_the_package_imports_torch_sacremoses_or_tiktoken() -> None:
    names = [f"txl_train.data.{module.name}" for module in pkgutil.iter_modules(txl_train.data.__path__)]
    assert "txl_train.data.tokenizers" in names
    code = f"import sys, {', '.join(names)}; print(sorted({{'torch', 'sacremoses', 'tiktoken'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
