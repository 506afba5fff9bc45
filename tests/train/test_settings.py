"""Settings: which source wins, how texts become values, what a mistake is told, where each value came from."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from txl_train import presets
from txl_train.config import RunConfig
from txl_train.errors import ConfigError, EnvironmentUnfitError, UsageError
from txl_train.settings import find, look_up, parse, resolve


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model:\n  n_layer: 3\n  cutoffs: [5, 9]\ntrain:\n  max_step: 77  # few\noptim:\n  lr: 1e-3\n  eta_min: 0\n", encoding="utf-8"
    )
    return path


def test_without_sources_all_settings_are_defaults() -> None:
    resolved = resolve(environment={})

    assert resolved.config == RunConfig()
    assert set(resolved.origin.values()) == {"default"}


def test_each_source_wins_over_those_before_it(config_file: Path) -> None:
    stored = {"train": {"max_step": 1, "seed": 1, "threads": 1, "tgt_len": 1}}
    environment = {"TXL_SEED": "3", "TXL_TRAIN_THREADS": "3", "TXL_TGT_LEN": "3"}
    overrides = [("threads", "4"), ("tgt_len", 4)]

    resolved = resolve(str(config_file), stored=stored, environment=environment, overrides=overrides, assignments=["train.tgt_len=5"])
    train = resolved.config.train

    assert (resolved.config.model.n_layer, train.max_step, train.seed, train.threads, train.tgt_len) == (3, 1, 3, 4, 5)
    assert resolved.origin["model.n_layer"] == "run.yaml:2"
    assert resolved.origin["train.max_step"] == "checkpoint"
    assert resolved.origin["train.seed"] == "environment TXL_SEED"
    assert resolved.origin["train.tgt_len"] == "command line"
    assert resolved.origin["train.log_interval"] == "default"


def test_every_difference_from_the_checkpoint_is_told_with_its_origin(config_file: Path) -> None:
    stored = {
        "model": {"n_layer": 3, "cutoffs": [5, 9], "clamp_len": None},
        "optim": {"lr": 0.003, "eta_min": 0.0},
        "train": {"max_step": 5, "seed": 1, "log_interval": 10},
    }

    resolved = resolve(
        str(config_file), stored=stored, environment={"TXL_SEED": "3"}, overrides=[("lr", "1e-2")], assignments=["clamp_len=8"]
    )

    assert set(resolved.differences) == {
        "lr: 0.003 in the checkpoint, now 0.01 (command line)",
        "clamp_len: none in the checkpoint, now 8 (command line)",
        "seed: 1 in the checkpoint, now 3 (environment TXL_SEED)",
        "max_step: 5 as in the checkpoint, not 77 (run.yaml:5)",
    }
    assert resolve(str(config_file), environment={}).differences == ()


def test_a_folder_spelled_in_another_way_is_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stored = {"train": {"work_dir": "W"}, "data": {"data": str(tmp_path / "text")}}

    same = resolve(environment={}, stored=stored, overrides=[("work_dir", "./W/"), ("data", "text")])
    other = resolve(environment={}, stored=stored, overrides=[("work_dir", "X")])

    assert same.differences == ()
    assert other.differences == ("work_dir: W in the checkpoint, now X (command line)",)


def test_one_setting_is_looked_up_though_others_do_not_fit(config_file: Path) -> None:
    environment, overrides = {"TXL_WORK_DIR": "there"}, [("lr", "1e-9"), ("eta-min", "1")]

    assert look_up("train.work_dir", environment={}) == "LM-TFM"
    assert look_up("train.max_step", str(config_file), environment={}) == 77
    assert look_up("train.work_dir", environment=environment, overrides=overrides) == "there"
    assert look_up("train.work_dir", environment=environment, overrides=overrides, assignments=["work_dir=here"]) == "here"


def test_values_from_a_file_have_their_types(config_file: Path) -> None:
    config = resolve(str(config_file), environment={}).config

    assert config.model.cutoffs == (5, 9)
    assert config.optim.lr == 0.001  # YAML reads 1e-3 as text
    assert isinstance(config.optim.eta_min, float)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("train.max_step", "12", 12),
        ("optim.lr", "1e-3", 0.001),
        ("model.adaptive", "Yes", True),
        ("model.adaptive", "off", False),
        ("model.clamp_len", "none", None),
        ("model.clamp_len", "-1", None),
        ("train.eval_max_steps", -1, None),
        ("train.max_minutes", "1.5", 1.5),
        ("model.cutoffs", "10, 20,30", (10, 20, 30)),
        ("model.cutoffs", "", ()),
        ("model.cutoffs", [10], (10,)),
        ("model.tie_projections", "false,true", (False, True)),
        ("model.tie_projections", "none", None),
        ("data.data", "some/folder", "some/folder"),
    ],
)
def test_text_becomes_the_type_of_the_setting(name: str, text: object, value: object) -> None:
    parsed = parse(name, text)

    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("train.max_step", "many", "a whole number"),
        ("train.max_step", "1.5", "a whole number"),
        ("train.max_step", 1.5, "a whole number"),
        ("train.max_step", True, "a whole number"),
        ("train.max_step", None, "a whole number"),
        ("optim.lr", "fast", "a number"),
        ("optim.lr", "nan", "a number"),
        ("model.adaptive", "perhaps", "true or false"),
        ("model.cutoffs", "10,x", "a comma-separated list, each a whole number"),
        ("model.clamp_len", "x", "a whole number, or none"),
        ("data.dataset", "", "text"),
        ("train.dtype", 16, "one of fp32, bf16, fp16"),
    ],
)
def test_a_value_of_the_wrong_type_names_setting_and_type(name: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(name, value)

    assert f"`{name.partition('.')[2]}` must be {expected}, but is {value!r}" in str(error.value)


def test_names_are_found_with_and_without_section_and_with_dashes() -> None:
    assert find("n_layer") == find("n-layer") == find("model.n_layer") == "model.n_layer"
    assert find("data") == "data.data"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_stpe", "Did you mean `max_step`?"),
        ("train.max_stpe", "Did you mean `max_step`?"),
        ("model.max_step", "Did you mean `train.max_step`?"),
        ("trian.max_step", "Did you mean `train`?"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_nearest_one(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint.replace("?", r"\?")):
        resolve(environment={}, assignments=[f"{name}=3"])


def test_an_assignment_without_a_value_is_an_error() -> None:
    with pytest.raises(ConfigError, match="key=value"):
        resolve(environment={}, assignments=["max_step"])


def test_an_unknown_environment_variable_is_an_error_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"`TXL_MAX_STPE` names no setting\. Did you mean `TXL_MAX_STEP`"):
        resolve(environment={"TXL_MAX_STPE": "3"})


def test_an_environment_variable_for_the_same_setting_twice_is_an_error() -> None:
    with pytest.raises(ConfigError, match="`TXL_SEED` and `TXL_TRAIN_SEED` both set"):
        resolve(environment={"TXL_SEED": "1", "TXL_TRAIN_SEED": "2"})


def test_other_environment_variables_are_left_alone() -> None:
    assert resolve(environment={"TXL_DEBUG": "1", "TXL_SHARED_DIR": "/x", "PATH": "/bin"}).config == RunConfig()


def test_a_value_out_of_range_names_where_it_came_from(config_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"`max_step` must be 1 or more, but is 0 instead. \(max_step: environment TXL_MAX_STEP\)"):
        resolve(str(config_file), environment={"TXL_MAX_STEP": "0"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  n_layer: 3\n  n_laier: 4\n", "run.yaml:3: `model.n_laier` is no setting. Did you mean `n_layer`?"),
        (
            "modle:\n  n_layer: 3\n",
            "run.yaml:1: `modle` is no section of the settings: they are model, data, optim, train. Did you mean `model`?",
        ),
        (
            "n_layer: 3\n",
            "run.yaml:1: `n_layer` is no section of the settings: they are model, data, optim, train. Did you mean `model.n_layer`",
        ),
        ("model:\n  n_layer: three\n", "`n_layer` must be a whole number, but is 'three' instead. (run.yaml:2)"),
        ("model:\n  n_layer: 3\n  n_layer: 4\n", "run.yaml:3: `n_layer` is given twice."),
        ("model:\n  n_layer: [3\n", "run.yaml:3: this is no valid YAML"),
        ("model: 3\n", "run.yaml:1: section `model` must be made of `key: value` lines."),
        ("- model\n", "run.yaml:1: a config file must be made of `key: value` lines."),
        ("model:\n  n_layer: !!python/object/apply:os.getcwd []\n", "run.yaml:2: this is no valid YAML"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")

    with pytest.raises(ConfigError) as error:
        resolve(str(path), environment={})

    assert message in str(error.value)


def test_an_empty_file_or_section_sets_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("# nothing\nmodel:\n", encoding="utf-8")

    assert resolve(str(path), environment={}).config == RunConfig()


def test_a_missing_config_is_an_error_that_lists_the_presets() -> None:
    with pytest.raises(UsageError, match="Did you mean `wt103-base`") as error:
        resolve("wt103-bas", environment={})

    assert all(name in str(error.value) for name in presets.names())


def test_a_folder_as_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        resolve(str(tmp_path), environment={})


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_resolves_and_says_where_it_comes_from(name: str) -> None:
    resolved = resolve(name, environment={})

    assert f"preset {name}" in resolved.origin.values()
    comment = presets.read(name).split("\nmodel:")[0]
    assert all(word in comment for word in ("Parameters:", "Source:", "Expected"))


def test_the_table_shows_name_value_and_origin(config_file: Path) -> None:
    rows = [line.split() for line in resolve(str(config_file), environment={}).table().splitlines()]

    assert ["model.n_layer", "3", "run.yaml:2"] in rows
    assert ["model.cutoffs", "5,9", "run.yaml:3"] in rows
    assert ["model.clamp_len", "none", "default"] in rows


def test_saved_settings_resolve_to_the_same_again(config_file: Path, tmp_path: Path) -> None:
    resolved = resolve(str(config_file), environment={}, overrides=[("data", "folder: with # signs"), ("lr", 1e-5), ("eta_min", 0)])
    saved = tmp_path / "config.yaml"

    resolved.save(saved)

    assert resolve(str(saved), environment={}).config == resolved.config
    assert yaml.safe_load(saved.read_text(encoding="utf-8"))["optim"]["lr"] == 1e-5
    assert "max_step: 77  # run.yaml:5" in saved.read_text(encoding="utf-8")


def test_settings_save_as_json_too(config_file: Path, tmp_path: Path) -> None:
    resolved = resolve(str(config_file), environment={})

    resolved.save(tmp_path / "config.json")

    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert saved["settings"]["model"]["n_layer"] == 3
    assert saved["origin"]["model.n_layer"] == "run.yaml:2"


def test_settings_that_cannot_be_saved_are_an_error_of_the_environment(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnfitError, match="cannot be written"):
        resolve(environment={}).save(tmp_path / "no" / "such" / "folder.yaml")


def test_settings_that_cannot_be_saved_leave_those_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    resolve(environment={}).save(path)
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(EnvironmentUnfitError, match="No space left"):
        resolve(environment={}, overrides=[("lr", 0.5)]).save(path)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["config.yaml"]


def test_settings_need_neither_pytorch_nor_numpy() -> None:
    code = (
        "import sys; from txl_train.settings import resolve; resolve('wt103-base'); sys.exit(bool({'torch', 'numpy'} & sys.modules.keys()))"
    )

    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0


@pytest.mark.parametrize("source", ["assignment", "environment"])
def test_the_specifications_name_of_a_setting_is_known_everywhere(source: str) -> None:
    given = {"assignments": ["warmup_step=7"]} if source == "assignment" else {"environment": {"TXL_WARMUP_STEP": "7"}}
    assert resolve(**({"environment": {}} | given)).config.optim.lr_warmup_steps == 7  # type: ignore[arg-type]


@pytest.mark.parametrize(("flag", "setting"), [("fp16", "train.dtype=fp16"), ("not_tied", "model.tie_weights=false")])
def test_an_option_that_is_no_setting_names_the_one_it_sets(flag: str, setting: str) -> None:
    for sources in ({"assignments": [f"{flag}=true"]}, {"environment": {f"TXL_{flag.upper()}": "1"}}):
        with pytest.raises(ConfigError, match=setting):
            resolve(**({"environment": {}} | sources))  # type: ignore[arg-type]
