"""`txl train`: train a model, or go on training one.

The options are made of the fields of `txl_train.config`, with their types, defaults and sentences; the specification's spellings are
added in `_SPELLINGS`. What settings mean, and which source wins, is known to `txl_train.settings`; training itself is `txl_train.run`.
"""

from __future__ import annotations

import dataclasses
import logging
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from txl_deploy.cli.options import echo_json, json_option, verbosity_options
from txl_train import presets, settings
from txl_train.config import SECTIONS, VALUE_ALIASES, field_docs
from txl_train.data.datasets import DATASETS
from txl_train.errors import UsageError

if TYPE_CHECKING:
    from txl_train.checkpoint import Checkpoint
    from txl_train.evaluate import EvalResult
    from txl_train.run import TrainResult

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

_LAST_OF_WORK_DIR = ":last"
"""What `--restart` stands for where it names no file."""

_SPELLINGS: dict[str, tuple[str, ...]] = {"optim.lr_warmup_steps": ("--warmup-step",)}
"""Further names of an option: the specification's, where ours differ."""

_FLAGS: dict[str, tuple[str, str, str]] = {
    "--cuda": ("train.device", "cuda", "The same as --device cuda."),
    "--fp16": ("train.dtype", "fp16", "The same as --dtype fp16."),
    "--bf16": ("train.dtype", "bf16", "The same as --dtype bf16."),
    "--not-tied": ("model.tie_weights", "false", "The same as --no-tie-weights."),
}
"""Options that set one setting to one value."""

_METAVARS = {int: "N", float: "X", str: "TEXT", bool: ""}


def _argument(name: str) -> str:
    return "setting_" + name.replace(".", "_")


def _show(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "empty"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def setting_options(command: F) -> F:
    """Add an option for every setting. Those not given are None; values stay text, which `settings` reads like any other source's."""
    for flag, (name, _, sentence) in reversed(_FLAGS.items()):
        command = click.option(flag, f"flag_{flag.strip('-').replace('-', '_')}", is_flag=True, help=f"{sentence} ({name})")(command)
    for section, cls in reversed(SECTIONS.items()):
        config_class: type = cls
        docs = field_docs(config_class)
        for field in reversed(dataclasses.fields(cls)):
            command = _setting_option(f"{section}.{field.name}", field.default, docs[field.name])(command)
    return command


def _setting_option(name: str, default: object, sentence: str) -> Callable[[F], F]:
    kind = settings.value_type(name)
    dashed = name.partition(".")[2].replace("_", "-")
    help_text = f"{sentence}  [{name}; default: {_show(default)}]"
    if kind is bool:
        return click.option(f"--{dashed}/--no-{dashed}", _argument(name), default=None, help=help_text)
    names = [f"--{dashed}", *_SPELLINGS.get(name, ())]
    choices = DATASETS if name == "data.dataset" else typing.get_args(kind) if typing.get_origin(kind) is Literal else None
    if choices:
        none = ["none"] if settings.allows_none(name) else []
        return click.option(*names, _argument(name), type=click.Choice([*choices, *VALUE_ALIASES.get(name, ()), *none]), help=help_text)
    metavar = f"{_METAVARS[typing.get_args(kind)[0]]},..." if typing.get_origin(kind) is tuple else _METAVARS[kind]
    metavar = {"data.data": "DIR", "train.work_dir": "DIR"}.get(name, metavar)
    return click.option(*names, _argument(name), metavar=metavar, help=help_text)


@click.command("train", context_settings={"token_normalize_func": lambda token: token.replace("_", "-")})
@click.option("--config", "config", metavar="NAME|FILE", help=f"A preset ({', '.join(presets.names())}) or a YAML file of settings.")
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set any setting, as key=value or section.key=value; may be given several times.",
)
@click.option(
    "--restart",
    is_flag=False,
    flag_value=_LAST_OF_WORK_DIR,
    metavar="[FILE]",
    help="Continue exactly where a checkpoint left off.  [default file: checkpoint_last.pt in --work-dir]",
)
@click.option("--resume", is_flag=True, help="The same as --restart without a file.")
@click.option("--auto-resume", is_flag=True, help="The same as --resume if the work folder holds a run to continue; otherwise begin.")
@click.option("--overwrite", is_flag=True, help="Begin anew in a work folder that holds a trained model, which is deleted.")
@click.option("--dry-run", is_flag=True, help="Print the settings with the origin of each, and stop.")
@click.option("--local-rank", type=int, hidden=True, expose_value=False, help="What older launchers pass; torchrun's environment says it.")
@json_option
@verbosity_options
@setting_options
@click.pass_context
def command(
    context: click.Context,
    /,
    config: str | None,
    assignments: tuple[str, ...],
    restart: str | None,
    resume: bool,
    auto_resume: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a model and write checkpoint_best.pt and checkpoint_last.pt into the work folder.

    Settings come from, the later winning over the earlier: defaults, --config, the checkpoint that is continued, the environment
    (TXL_<SECTION>_<KEY> or TXL_<KEY>), options, --set. `none` clears an optional setting, and so does -1.

    Ctrl-C or SIGTERM finishes the step and saves; `--resume` then continues to the same result, on a CPU to the last bit.
    """
    overrides = _overrides(options)
    if (restart is not None) + resume + auto_resume > 1:
        raise UsageError("Give only one of `--restart`, `--resume` and `--auto-resume`.")
    restart = _LAST_OF_WORK_DIR if resume else restart
    checkpoint: Checkpoint | None = None
    in_place = False
    stored: dict[str, dict[str, Any]] | None = None
    work_dir, named = _work_dir(config, overrides, assignments)
    if auto_resume and _holds_a_run(work_dir):
        restart = _LAST_OF_WORK_DIR
    if restart:
        path = _checkpoint_path(restart, work_dir)
        checkpoint, stored = _load(path)
        if named and path.parent.resolve() == work_dir.resolve():
            assignments = (*assignments, f"train.work_dir={path.parent}", "train.append_dataset=false", "train.append_time=false")
    elif begin_with := settings.look_up("train.init_from", config, overrides=overrides, assignments=assignments):
        stored = {"model": _model_settings(Path(begin_with))}
    resolved = settings.resolve(config, stored=stored, overrides=overrides, assignments=assignments)
    if restart:
        in_place = path.parent.resolve() == Path(resolved.config.train.work_dir).resolve()
        if overwrite and in_place:
            raise UsageError("`--overwrite` deletes the run that `--restart` is to continue: give one of them.")
    if dry_run:
        for line in resolved.differences:
            log.info("%s", line)
        if as_json:
            echo_json(resolved.to_dict())
        else:
            click.echo(resolved.table())
        return

    from txl_train.callbacks import by_signal
    from txl_train.distributed import world_of
    from txl_train.files import finite
    from txl_train.run import train

    world = world_of()
    if not world.is_main and not resolved.config.train.log_all_ranks:
        logging.getLogger("txl_train").setLevel(logging.WARNING)
    result = train(resolved, continue_from=checkpoint, in_place=in_place, overwrite=overwrite, world=world)
    if world.is_main:
        if as_json:
            echo_json(finite(result.to_dict()))
        else:
            click.echo(_summary(result))
    if result.ending == "sigint":
        context.exit(130)
    if world.is_main and not by_signal(result.ending):
        result.check_targets(resolved.config.train)


def _overrides(options: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return (setting, value) of the options given, in the order of the settings, then the flags."""
    given = [
        (f"{section}.{field.name}", options[_argument(f"{section}.{field.name}")])
        for section, cls in SECTIONS.items()
        for field in dataclasses.fields(cls)
    ]
    overrides = {name: value for name, value in given if value is not None}
    by_flag: dict[str, str] = {}
    for flag, (name, value, _) in _FLAGS.items():
        if not options[f"flag_{flag.strip('-').replace('-', '_')}"]:
            continue
        if name in overrides and settings.parse(name, overrides[name]) != settings.parse(name, value):
            raise UsageError(f"`{by_flag.get(name, '--' + name.partition('.')[2].replace('_', '-'))}` and `{flag}` contradict each other.")
        overrides[name] = value
        by_flag[name] = flag
    return list(overrides.items())


def _work_dir(config: str | None, overrides: list[tuple[str, Any]], assignments: tuple[str, ...]) -> tuple[Path, bool]:
    """Return the work folder, and whether its name is made of more than `--work-dir`: then the newest one that can be continued."""

    def value(name: str) -> Any:
        return settings.look_up(f"train.{name}", config, overrides=overrides, assignments=assignments)

    folder, dataset = Path(value("work_dir")), value("append_dataset")
    if dataset:
        name = settings.look_up("data.dataset", config, overrides=overrides, assignments=assignments)
        folder = folder.with_name(f"{folder.name}-{name}")
    if not value("append_time"):
        return folder, bool(dataset)
    begun = sorted(path for path in folder.glob("[0-9]*-[0-9]*") if _holds_a_run(path))
    return (begun[-1] if begun else folder), True


def _holds_a_run(work_dir: Path) -> bool:
    from txl_train.callbacks import LAST_NAME

    return (work_dir / LAST_NAME).exists()


def _checkpoint_path(restart: str, work_dir: Path) -> Path:
    from txl_train.callbacks import LAST_NAME

    if restart != _LAST_OF_WORK_DIR:
        return Path(restart)
    last = work_dir / LAST_NAME
    if not last.exists():
        raise UsageError(
            f"There is nothing to continue in {work_dir}: it has no {LAST_NAME}.",
            remedy="Leave `--resume` or `--restart` out to begin, or name a checkpoint.",
        )
    return last


def _model_settings(path: Path) -> dict[str, Any]:
    """Return the settings of the model whose weights training is to begin with."""
    from txl_train.checkpoint import load_checkpoint
    from txl_train.config import to_dict

    return to_dict(load_checkpoint(path).model_config)


def _load(path: Path) -> tuple[Checkpoint, dict[str, dict[str, Any]]]:
    """Return a checkpoint and the settings it was trained with; its folders are those where the files are now."""
    from txl_train.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(path)
    stored = {section: dict(values) for section, values in checkpoint.settings.items()}
    if checkpoint.training is None:
        raise UsageError(
            f"{path} is for use only: it holds no training state to continue from.",
            remedy=f"Continue from checkpoint_last.pt of its run, or begin a new run with its weights: `--init-from {path}`.",
        )
    if not stored:
        raise UsageError(f"{path} does not say how it was trained, so training cannot be continued.", remedy="Train anew.")
    stored["train"] |= {"work_dir": str(path.parent), "append_dataset": False, "append_time": False}
    if stored["data"]["data"] is not None:
        stored["data"]["data"] = checkpoint.data_folder
    return checkpoint, stored


def _summary(result: TrainResult) -> str:
    verb = "Stopped" if result.ending in ("sigint", "sigterm") else "Finished"
    lines = [f"{verb} after {result.progress.step:,} steps ({result.ending})" + (f" in {result.work_dir}" if result.work_dir else "")]
    for split, figures in (("valid", result.valid), ("test", result.test)):
        if figures is not None:
            lines.append(f"{split:<6}{_score(figures, result.char)}")
    document = result.to_dict()
    lines += [f"{what}  {document[key]}" for what, key in (("best", "checkpoint_best"), ("last", "checkpoint_last")) if document[key]]
    return "\n".join(lines)


def _score(figures: EvalResult, char: bool) -> str:
    score = f"bits per character {figures.bits_per_char:.5f}" if char else f"perplexity {figures.perplexity:.3f}"
    return f"{score} ({figures.nll_nats_per_token:.4f} nats per token over {figures.n_tokens:,} tokens)"
