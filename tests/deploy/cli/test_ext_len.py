"""`--ext-len` from export to measurement: the artifact reads the tokens before each segment once more, as its checkpoint does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.deploy.conftest import Exports
from txl_deploy.cli.main import main


def test_an_artifact_with_extension_is_evaluated_proved_and_measured(
    exports: Exports, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, artifact = str(exports.checkpoint), str(tmp_path / "scripted")
    assert main(["export", "--checkpoint", checkpoint, "--format", "torchscript", "--out", artifact, "--ext-len", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ext_len"] == 3
    losses = []
    for source in (["--artifact", artifact], ["--checkpoint", checkpoint, "--ext-len", "3"], ["--checkpoint", checkpoint]):
        assert main(["eval", *source, "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["nll_nats_per_token"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert abs(losses[0] - losses[2]) > 1e-4
    assert main(["parity", "--checkpoint", checkpoint, "--artifact", artifact]) == 0
    assert "PASSED" in capsys.readouterr().out
    quick = ["--batch-sizes", "2", "--duration", "0.05", "--max-duration", "0.1", "--min-samples", "3", "--accept-invalid", "--json"]
    assert main(["eval", "--checkpoint", checkpoint, "--artifact", artifact, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["receipt"]["passed"] is True
    assert main(["bench", "--checkpoint", checkpoint, "--artifact", artifact, *quick]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 2
    assert rows[0]["perplexity"] == pytest.approx(rows[1]["perplexity"], rel=1e-5)
    assert main(["eval", "--artifact", artifact, "--ext-len", "2"]) == 2
    assert "`--ext-len` 3, but 2" in capsys.readouterr().err
