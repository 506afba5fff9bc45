"""The command line as a whole: instant help, names that are nearly right, and how each kind of error ends."""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import txl_train
from txl_deploy.cli import main as main_module
from txl_deploy.cli.main import COMMANDS, cli, main
from txl_deploy.cli.options import echo_json, set_up_logging, verbosity_options
from txl_train.data.vocabulary import Vocabulary
from txl_train.errors import CheckpointError, DataError, EnvironmentUnfitError, TxlError, ValidationError

START = "import sys; from txl_deploy.cli.main import main; sys.exit(main())"


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """`main` sets up logging for a process; put back what other tests rely on."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    logging.captureWarnings(False)
    root.setLevel(level)
    root.handlers[:] = handlers
    for name in ("txl_train", "txl_deploy", "py.warnings"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return `run(body, *options)`, which gives `txl` one more command, `try`, whose body this is, and runs it."""

    def run(body: Callable[[], object], *options: str) -> int:
        @click.command("try")
        @click.option("--mem-len", type=int)
        @verbosity_options
        def command(mem_len: int | None) -> None:
            body()

        module = types.ModuleType("txl_try")
        module.__dict__["command"] = command
        monkeypatch.setitem(sys.modules, "txl_try", module)
        monkeypatch.setitem(COMMANDS, "try", ("txl_try:command", "Try something."))
        return main(["try", *options])

    return run


def raiser(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


def in_a_process(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", START, *arguments], capture_output=True, text=True, check=False, **settings)


def test_help_lists_every_command_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, (_, help_line) in COMMANDS.items():
        assert f"  {name}" in shown
        assert " ".join(help_line.split()[:3]) in shown


def test_help_imports_neither_torch_nor_numpy() -> None:
    program = (
        "import sys; from txl_deploy.cli.main import main; code = main(['--help'])\n"
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'rich', 'yaml', 'matplotlib', 'sacremoses'} & set(sys.modules)\n"
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_help_answers_within_0_3_seconds() -> None:
    in_a_process("--help")
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        in_a_process("--help")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3  # the fastest of five: other work on the machine only ever adds


def test_no_command_shows_the_help_and_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"txl {txl_train.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_exists_and_explains_itself(name: str) -> None:
    module, _, attribute = COMMANDS[name][0].partition(":")
    command = getattr(importlib.import_module(module), attribute)
    assert isinstance(command, click.Command)
    assert command.name == name
    assert command.help
    leaves = command.commands.values() if isinstance(command, click.Group) else [command]
    for leaf in leaves:
        assert {"-v", "-q"} <= {spelling for parameter in leaf.params for spelling in parameter.opts}, f"{leaf.name} takes no -v and -q"
        for parameter in leaf.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name}: {parameter.opts[0]} has no help"


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_has_help(name: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, flag]) == 0
    assert f"txl {name}" in capsys.readouterr().out


def test_a_misspelt_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exprot"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "`exprot` is no command of txl. Did you mean `export`?" in captured.err


def test_a_misspelt_option_names_the_nearest(run_command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: None, "--mem-ln", "3") == 2
    assert "Did you mean" in capsys.readouterr().err


def test_the_underscore_spelling_of_an_option_is_understood(run_command: Callable[..., int]) -> None:
    assert run_command(lambda: None, "--mem_len", "3") == 0


@pytest.mark.parametrize("error_type", [ValidationError, DataError, EnvironmentUnfitError, CheckpointError])
def test_an_error_of_ours_shows_cause_and_remedy_and_its_exit_code(
    error_type: type[TxlError], run_command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(raiser(error_type("The cause.", remedy="The remedy."))) == error_type.exit_code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "Error: The cause.\nThe remedy.\n"


def test_a_bug_is_called_one_and_hides_its_traceback(run_command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(raiser(KeyError("n_head"))) == main_module.EXIT_BUG == 70
    shown = capsys.readouterr().err
    assert "KeyError: 'n_head'" in shown
    assert "bug" in shown
    assert "TXL_DEBUG=1" in shown
    assert "Traceback" not in shown


def test_debugging_shows_the_traceback(
    run_command: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_command(raiser(DataError("Empty.")), "-v") == 2
    assert "Traceback" not in capsys.readouterr().err
    assert run_command(raiser(DataError("Empty.")), "-vv") == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err
    monkeypatch.setenv("TXL_DEBUG", "1")
    assert run_command(raiser(ZeroDivisionError("x"))) == 70
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_ctrl_c_ends_with_130_and_one_line(run_command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(raiser(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_a_file_system_error_names_the_file(run_command: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run_command(lambda: (tmp_path / "absent").read_text()) == 3
    assert f"No such file or directory: {tmp_path / 'absent'}" in capsys.readouterr().err


def test_a_missing_package_names_the_command_that_installs_it(run_command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(raiser(ModuleNotFoundError("No module named 'onnx'", name="onnx.helper"))) == 3
    shown = capsys.readouterr().err
    assert "This needs `onnx.helper`, which is not installed" in shown
    assert "pip install 'onnx" in shown
    assert run_command(raiser(ModuleNotFoundError("No module named 'txl_deploy.x'", name="txl_deploy.x"))) == 70


def test_running_out_of_memory_is_no_bug(run_command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(raiser(MemoryError())) == 3
    assert "smaller batch size" in capsys.readouterr().err


def test_an_exit_code_of_a_command_is_kept(run_command: Callable[..., int]) -> None:
    assert run_command(lambda: click.get_current_context().exit(1)) == 1


@pytest.mark.skipif(os.name != "posix", reason="signals and pipes of POSIX")
class TestAsAProcess:
    """What only shows in a process of its own."""

    def test_a_reader_that_stops_early_ends_it_quietly(self) -> None:
        program = (
            "import sys, types, click\n"
            "from txl_deploy.cli import main as m\n"
            "module = sys.modules['txl_try'] = types.ModuleType('txl_try')\n"
            "def body():\n"
            "    for i in range(100000): print('a line of text')\n"
            "module.command = click.Command('try', callback=body)\n"
            "m.COMMANDS['try'] = ('txl_try:command', 'x')\n"
            "sys.exit(m.main(['try']))\n"
        )
        shell = f'"{sys.executable}" -c "$PROGRAM" | head -n 1; exit ${{PIPESTATUS[0]}}'
        done = subprocess.run(["bash", "-c", shell], env={**os.environ, "PROGRAM": program}, capture_output=True, text=True, check=False)
        assert done.returncode == 141  # 128 + SIGPIPE, as of any other tool
        assert done.stdout == "a line of text\n"
        assert done.stderr == ""

    def test_help_into_a_closed_pipe_is_quiet(self) -> None:
        shell = f'"{sys.executable}" -c "{START}" --help | true; exit ${{PIPESTATUS[0]}}'
        done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
        assert done.returncode in (0, 141)
        assert done.stderr == ""

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_a_full_disk_is_an_error(self) -> None:
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, "-c", START, "--version"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 3
        assert "No space left on device" in done.stderr
        assert "Traceback" not in done.stderr

    def test_a_terminal_without_the_characters_gets_them_escaped(self, tmp_path: Path) -> None:
        vocabulary = tmp_path / "vocabulary.json"
        Vocabulary(["→"], unit="word").save(vocabulary)
        done = in_a_process("inspect", str(vocabulary), env={**os.environ, "PYTHONIOENCODING": "latin-1"})
        assert done.returncode == 0, done.stderr
        assert "\\u2192" in done.stdout

    def test_ctrl_c_during_work(self) -> None:
        program = (
            "import sys, types, click, time\n"
            "from txl_deploy.cli import main as m\n"
            "module = sys.modules['txl_try'] = types.ModuleType('txl_try')\n"
            "def body():\n"
            "    click.echo('working')\n"
            "    time.sleep(30)\n"
            "module.command = click.Command('try', callback=body)\n"
            "m.COMMANDS['try'] = ('txl_try:command', 'x')\n"
            "sys.exit(m.main(['try']))\n"
        )
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 130
        assert errors == "Interrupted.\n"


def test_the_log_goes_to_standard_error_and_names_what_is_worse_than_progress(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging()
    set_up_logging()  # once more changes nothing
    log = logging.getLogger("txl_train.trainer")
    log.info("| epoch 1 step 10")
    log.warning("Slow.")
    log.debug("detail")
    logging.getLogger("some.library").info("chatter")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "| epoch 1 step 10\nWarning: Slow.\n"


@pytest.mark.parametrize(
    ("options", "heard"),
    [
        ([], "info warning error"),
        (["-v"], "debug info warning error"),
        (["-q"], "warning error"),
        (["-qq"], "error"),
        (["-v", "-q"], "info warning error"),
    ],
)
def test_verbosity_chooses_what_is_heard(
    options: list[str], heard: str, run_command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> None:
        for level in ("debug", "info", "warning", "error"):
            getattr(logging.getLogger("txl_deploy.cli.try"), level)(level)

    assert run_command(body, *options) == 0
    assert " ".join(line.split()[-1] for line in capsys.readouterr().err.splitlines()) == heard


def test_json_is_one_document_whatever_the_characters(capsys: pytest.CaptureFixture[str]) -> None:
    echo_json({"text": "é→😀", "perplexity": 1.5})
    shown = capsys.readouterr().out
    assert shown.isascii()
    assert json.loads(shown) == {"text": "é→😀", "perplexity": 1.5}
    with pytest.raises(ValueError, match="Out of range"):
        echo_json({"perplexity": float("nan")})


def test_the_group_is_what_a_shell_completes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", START],
        env={**os.environ, "_TXL_COMPLETE": "bash_complete", "COMP_WORDS": "txl ver", "COMP_CWORD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["plain,verify"]
    assert isinstance(cli, click.Group)
