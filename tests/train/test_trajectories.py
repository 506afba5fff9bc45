"""Training as NVIDIA's code did it, step by step from the same weights: `txl train --compat nvidia-2023` against what was recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.reference import nvidia
from tests.support import build_model
from txl_deploy.cli.main import main
from txl_train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from txl_train.config import DataConfig, ModelConfig
from txl_train.run import open_corpus

OPTIONS = (
    *("n_layer", "n_head", "d_head", "d_embed", "d_model", "d_inner", "dropout", "dropatt", "attn_type", "clamp_len", "div_val"),
    *("optim", "lr", "mom", "scheduler", "max_step_scheduler", "warmup_step", "decay_rate", "lr_min", "clip", "weight_decay", "patience"),
    *("eta_min", "max_step", "batch_size", "batch_chunk", "tgt_len", "ext_len", "mem_len", "seed"),
    *("eval_tgt_len", "eval_batch_size", "eval_max_steps", "eval_interval"),
)
"""The reference's options that have a value, by its names, which ours are too."""
FLAGS = ("adaptive", "same_length", "pre_lnorm", "not_tied", "roll", "varlen", "clip_nonemb")


def command_line(recorded: dict[str, Any], root: Path, weights: Path, work_dir: Path) -> list[str]:
    """The command that trains as recorded: the reference's own options in its own spelling."""
    arguments = recorded["args"]
    given = [word for name in OPTIONS if arguments[name] is not None for word in (f"--{name}", str(arguments[name]))]
    given += [f"--{name}" for name in FLAGS if arguments[name]]
    if arguments["adaptive"]:  # there they are in the code
        given += ["--cutoffs", ",".join(map(str, recorded["model_config"]["cutoffs"]))]
    data = ["--dataset", arguments["dataset"], "--data", str(root / arguments["data"])]
    ours = ["--compat", "nvidia-2023", "--init-from", str(weights), "--log-interval", "1", "--work_dir", str(work_dir), "-q"]
    return ["train", *given, *data, *ours]


def with_initial_weights(path: Path, recorded: dict[str, Any], arrays: Any, root: Path, cache: Path) -> ModelConfig:
    """Write the recorded initial weights as a checkpoint."""
    arguments = recorded["args"]
    config = nvidia.map_config(recorded["model_config"], "2023")
    corpus = open_corpus(DataConfig(dataset=arguments["dataset"], data=str(root / arguments["data"])), cache, "nvidia-2023")
    model = build_model(config, weights_of(arrays, "init", config))
    checkpoint = Checkpoint(
        model_config=config,
        model=model.parameters_by_name(),
        vocabulary=corpus.vocabulary,
        dataset=arguments["dataset"],
        run={},
        progress={},
    )
    save_checkpoint(path, checkpoint)
    return config


def weights_of(arrays: Any, when: str, config: ModelConfig) -> dict[str, np.ndarray]:
    return nvidia.map_parameters({key.partition("/")[2]: arrays[key] for key in arrays.files if key.startswith(when)}, config)


@pytest.mark.parametrize("case", ["jitlamb", "chunk2", "samelen", "divval2", "adam"])
def test_a_recorded_training_is_reproduced_from_the_command_line(
    reference_cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setenv("TXL_CACHE_DIR", str(tmp_path / "cache"))
    recorded = json.loads((reference_cases / "trajectories" / "trajectories.json").read_text(encoding="utf-8"))[case]
    with np.load(reference_cases / "trajectories" / f"{case}.npz") as arrays:
        config = with_initial_weights(tmp_path / "init.pt", recorded, arrays, reference_cases, tmp_path / "cache")
        last = weights_of(arrays, "final", config)

    assert main(command_line(recorded, reference_cases, tmp_path / "init.pt", tmp_path / "W")) == 0

    records = [json.loads(line) for line in (tmp_path / "W" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = [record for record in records if record["kind"] == "train"]
    for ours, theirs, tolerance in (
        ("loss_nats_per_token", "loss", 2e-6),  # measured: 2e-7, the rounding of float32
        ("grad_norm", "grad_norm", 2e-6),
        ("lr", "lr", 1e-12),
    ):
        expected = [step[theirs] for step in recorded["steps"]]
        np.testing.assert_allclose([record[ours] for record in trained], expected, rtol=tolerance, err_msg=ours)
    expected_model = build_model(config, last)
    for name, weight in load_checkpoint(tmp_path / "W" / "checkpoint_last.pt").model.items():
        if weight.numel():  # Adam moves a weight whose gradient is nearly 0 in a random direction
            torch.testing.assert_close(
                weight, expected_model.get_parameter(name).detach(), rtol=1e-5, atol=1e-4 if case == "adam" else 2e-6
            )


def test_without_the_compatible_mode_the_first_step_is_taken_at_the_warm_up_rate(
    reference_cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TXL_CACHE_DIR", str(tmp_path / "cache"))
    recorded = json.loads((reference_cases / "trajectories" / "trajectories.json").read_text(encoding="utf-8"))["adam"]
    with np.load(reference_cases / "trajectories" / "adam.npz") as arrays:
        with_initial_weights(tmp_path / "init.pt", recorded, arrays, reference_cases, tmp_path / "cache")
    command = command_line(recorded, reference_cases, tmp_path / "init.pt", tmp_path / "W")
    command[command.index("--compat") + 1] = "none"

    assert main([*command, "--max-step", "2", "--max-step-scheduler", "40"]) == 0

    records = [json.loads(line) for line in (tmp_path / "W" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert recorded["steps"][0]["lr"] == recorded["args"]["lr"], "the reference begins at the full rate"
    assert [record["lr"] for record in records if record["kind"] == "train"] == pytest.approx([0.0001, 0.0002])
