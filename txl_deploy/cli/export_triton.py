"""The part of `txl export` that is about Triton Inference Server: a model in its repository, and graphs in the form for servers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import click

from txl_deploy.cli.options import command_line, echo_json
from txl_train.errors import UsageError

if TYPE_CHECKING:
    from txl_deploy.triton.config import Backend

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class TritonOptions:
    """What was said about serving."""

    for_triton: bool
    backend: str | None
    name: str
    max_batch_size: int
    max_sequences: int
    max_idle: float
    queue_delay: int
    max_tokens: int
    instances: int
    serve_on: str | None

    NAMES: ClassVar[tuple[str, ...]] = (
        "for_triton",
        "backend",
        "name",
        "max_batch_size",
        "max_sequences",
        "max_idle",
        "queue_delay",
        "max_tokens",
        "instances",
        "serve_on",
    )

    def refuse(self, context: click.Context, format_name: str) -> None:
        """Raise `UsageError` for an option that only a server takes."""
        for name in self.NAMES:
            if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
                raise UsageError(
                    f"`--{name.replace('_', '-')}` is for a server, not for `--format {format_name}`.",
                    remedy="Leave it out, or use `--format triton`.",
                )


_OPTIONS = (
    click.option(
        "--for-triton",
        is_flag=True,
        help="With --format onnx and --artifact: rewrite the graph for servers that keep the memory; engines for Triton are built of it.",
    ),
    click.option(
        "--backend",
        type=click.Choice(["python", "onnxruntime", "tensorrt"]),
        help="For triton: what runs the model in the server.  [default: python; of a graph or engine for servers its own]",
    ),
    click.option("--name", default="txl", show_default=True, metavar="NAME", help="For triton: the model's name in the server."),
    click.option(
        "--max-batch-size",
        type=click.IntRange(min=1),
        default=8,
        show_default=True,
        metavar="N",
        help="For triton: sequences that step together at most.",
    ),
    click.option(
        "--max-sequences",
        type=click.IntRange(min=1),
        default=64,
        show_default=True,
        metavar="N",
        help="For triton: sequences with a memory at once, of each instance; others wait.",
    ),
    click.option(
        "--max-idle",
        type=click.FloatRange(min=0.1),
        default=60,
        show_default=True,
        metavar="S",
        help="For triton: seconds without a request after which a sequence is forgotten.",
    ),
    click.option(
        "--queue-delay",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        metavar="US",
        help="For triton: microseconds that a request waits for others to step with.",
    ),
    click.option(
        "--max-tokens",
        type=click.IntRange(min=1),
        default=8192,
        show_default=True,
        metavar="N",
        help="For triton, backend python: tokens of a request at most.",
    ),
    click.option(
        "--instances",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        metavar="N",
        help="For triton: copies of the model on each device.",
    ),
    click.option("--serve-on", type=click.Choice(["cpu", "gpu"]), help="For triton: where the model runs.  [default: cpu; of engines gpu]"),
)


def triton_options(command: F) -> F:
    """Add the options about serving, as one argument `triton: TritonOptions`."""

    @functools.wraps(command)
    def gathered(*args: Any, **values: Any) -> Any:
        taken = {name: values.pop(name) for name in TritonOptions.NAMES}
        return command(*args, triton=TritonOptions(**taken), **values)

    wrapped: Any = gathered
    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return cast(F, wrapped)


def serve(
    artifacts: tuple[Path, ...],
    format_name: str,
    out: Path | None,
    options: TritonOptions,
    *,
    threads: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write a graph in the form for servers, or a model into a repository, and say what was written."""
    if not artifacts:
        raise UsageError("A server runs an exported model.", remedy="Give `--artifact DIR`.")
    if out is None:
        raise UsageError("There is no folder to write to.", remedy="Name it with `--out DIR`.")
    if options.for_triton:
        _rewrite(artifacts, format_name, out, overwrite=overwrite, as_json=as_json)
        return
    from txl_deploy.manifest import read_manifest
    from txl_deploy.triton.config import ServeOptions
    from txl_deploy.triton.repository import write_repository

    device = options.serve_on or ("gpu" if read_manifest(artifacts[0]).engine is not None else "cpu")
    written = write_repository(
        artifacts,
        out,
        ServeOptions(
            name=options.name,
            max_batch_size=options.max_batch_size,
            max_sequences=options.max_sequences,
            max_idle_s=options.max_idle,
            queue_delay_us=options.queue_delay,
            max_tokens=options.max_tokens,
            instances=options.instances,
            device=cast(Any, device),
            threads=threads,
        ),
        backend=cast("Backend | None", options.backend),
        overwrite=overwrite,
        command=command_line(),
    )
    if as_json:
        echo_json(
            {
                "repository": str(written.repository),
                "name": written.name,
                "backend": written.backend,
                "tgt_len": written.tgt_len,
                "minimum_server": written.minimum_server,
                "plans": written.plans,
            }
        )
        return
    takes = "text or token ids of any length" if written.backend == "python" else f"segments of {written.tgt_len} token ids"
    click.echo(f"{written.repository / written.name}: model {written.name} for Triton's {written.backend} backend; a request sends {takes}")
    for capability, plan in written.plans.items():
        click.echo(f"  compute capability {capability}: {plan}")
    click.echo(f"  from Triton {written.minimum_server} on: tritonserver --model-repository={written.repository}")


def _rewrite(artifacts: tuple[Path, ...], format_name: str, out: Path, *, overwrite: bool, as_json: bool) -> None:
    if format_name != "onnx" or len(artifacts) != 1:
        raise UsageError(
            "`--for-triton` rewrites one ONNX graph.",
            remedy="Use `--format onnx --artifact DIR --for-triton`, and build engines of the result with `--format trt --artifact`.",
        )
    from txl_deploy.export.served import export_served

    served = export_served(artifacts[0], out, overwrite=overwrite, command=command_line())
    if as_json:
        passed = None if served.parity is None else served.parity.passed
        echo_json({"directory": str(served.directory), "format": "onnx", "parent": str(artifacts[0]), "checked": passed})
        return
    click.echo(f"{served.directory}: {artifacts[0]} in the form for servers")
    if served.parity is None:
        click.echo("Not compared with it: the package that runs it is not installed here (`txl doctor`).", err=True)
    else:
        click.echo(f"Compared with it over {served.parity.n_segments} segments of random tokens: {served.parity.reason}.")
