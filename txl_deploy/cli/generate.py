"""`txl generate`: goes on with a text."""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from txl_deploy.cli.options import (
    command_line,
    device_option,
    dtype_option,
    echo_json,
    json_option,
    threads_option,
    verbosity_options,
)
from txl_train.data.datasets import DATASETS
from txl_train.errors import UsageError

if TYPE_CHECKING:
    from txl_deploy.generate import Generator, Timing, Token
    from txl_deploy.manifest import Dtype
    from txl_deploy.opening import Opened
    from txl_deploy.sampling import Sampling
    from txl_deploy.text_stream import TextStream

SEGMENT_LEN = 64
"""Tokens of a prompt that a checkpoint reads at a time."""

log = logging.getLogger(__name__)


@click.command("generate")
@click.option("--checkpoint", "--model", type=click.Path(path_type=Path), metavar="FILE", help="A checkpoint that `txl train` wrote.")
@click.option(
    "--artifact",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="An exported model: `txl export --head logits --tgt-len 1` (or --head log-probs).",
)
@click.option(
    "--prefill-artifact",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="DIR",
    help="With --artifact: an export of the same checkpoint and lengths for longer segments, of any head, to read the prompt with.",
)
@click.option(
    "--runtime",
    "--type",
    type=click.Choice(["pytorch", "compiled", "torchscript", "onnx"]),
    help="What to run a checkpoint with.  [default: pytorch]",
)
@click.option("--prompt", metavar="TEXT", help="The text to go on with, raw; empty: the beginning of a line.")
@click.option(
    "--prompt-file",
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="FILE",
    help="The same from a file, or from standard input: -",
)
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=100, show_default=True, metavar="N", help="Tokens of each sample at most."
)
@click.option(
    "--temperature", type=float, default=1.0, show_default=True, metavar="X", help="Log p is divided by it; 0: the most probable token."
)
@click.option("--top-k", type=int, metavar="N", help="Draw among the N most probable tokens.  [default: all]")
@click.option("--top-p", type=float, metavar="X", help="Draw among the fewest tokens that together reach this probability.  [default: all]")
@click.option("--no-unk", is_flag=True, help="Never draw the token for unknown words; the others share its probability.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="The same seed gives the same text.")
@click.option("--num-samples", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="How many continuations.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End a sample before this text; may be given several times.")
@click.option("--stop-at-eos", is_flag=True, help="End a sample at the end of a line.")
@click.option(
    "--segment-len", type=click.IntRange(min=1), metavar="N", help="Tokens of the prompt that a checkpoint reads at a time.  [default: 64]"
)
@click.option("--mem-len", type=click.IntRange(min=0), metavar="N", help="Past positions kept per layer, in tokens.  [default: as trained]")
@click.option(
    "--clamp-len", type=int, metavar="N", help="Distances above it share one encoding, in tokens; -1: no limit.  [default: as trained]"
)
@click.option("--same-length/--no-same-length", default=None, help="Every token attends to the same number of keys.  [default: as trained]")
@click.option("--dataset", type=click.Choice(list(DATASETS)), help="How text becomes tokens and back.  [default: the checkpoint's]")
@dtype_option("of a checkpoint; an exported model has its own.  [default: fp32]")
@click.option("--echo/--no-echo", default=True, show_default=True, help="Print the prompt before each continuation.")
@click.option("--raw", is_flag=True, help="Print tokens as they are rather than text.")
@click.option("--stream", is_flag=True, help="Print the text as it comes; one sample.")
@device_option
@threads_option
@json_option
@verbosity_options
def command(
    checkpoint: Path | None,
    artifact: Path | None,
    prefill_artifact: tuple[Path, ...],
    runtime: str | None,
    prompt: str | None,
    prompt_file: Path | None,
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    no_unk: bool,
    seed: int,
    num_samples: int,
    stop: tuple[str, ...],
    stop_at_eos: bool,
    segment_len: int | None,
    mem_len: int | None,
    clamp_len: int | None,
    same_length: bool | None,
    dataset: str | None,
    dtype: str | None,
    echo: bool,
    raw: bool,
    stream: bool,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Go on with a text.

    Tokens are drawn from the model's own distribution over the whole vocabulary; `--temperature 0` takes the most probable one. The same
    seed gives the same text, whatever --num-samples is.
    """
    if (checkpoint is None) == (artifact is None):
        raise UsageError("Give either `--checkpoint` or `--artifact`.")
    if artifact is not None:
        for name, value in {
            "runtime": runtime,
            "segment-len": segment_len,
            "mem-len": mem_len,
            "clamp-len": clamp_len,
            "same-length": same_length,
        }.items():
            if value is not None:
                raise UsageError(f"`--{name}` is fixed in an exported model.", remedy="Leave it out, or give the checkpoint.")
    elif prefill_artifact:
        raise UsageError(
            "`--prefill-artifact` goes with `--artifact`.", remedy="Of a checkpoint, `--segment-len` says how it reads the prompt."
        )
    if stream and (as_json or num_samples > 1):
        raise UsageError("`--stream` prints one sample as text.", remedy="Leave out `--json` and `--num-samples`, or `--stream`.")
    text = _prompt(prompt, prompt_file)

    from txl_deploy.generate import Timing
    from txl_deploy.opening import Lengths
    from txl_deploy.sampling import Sampling

    Sampling(temperature=temperature, top_k=top_k, top_p=top_p)  # before a model is opened
    lengths = Lengths(tgt_len=1, mem_len=mem_len, ext_len=0, clamp_len=clamp_len, same_length=same_length)
    with contextlib.ExitStack() as stack:
        opened, generator = open_generator(
            stack, checkpoint, artifact, prefill_artifact, runtime or "pytorch", lengths, dtype, device, threads, segment_len or SEGMENT_LEN
        )
        unk_id = opened.model_data.vocabulary.unk_id
        sampling = Sampling(forbidden=(unk_id,) if no_unk and unk_id is not None else (), temperature=temperature, top_k=top_k, top_p=top_p)
        run = _Run(opened, generator, text, dataset, raw, stop, stop_at_eos)
        timing = Timing()
        tokens = run.tokens(max_tokens, sampling, seed, num_samples, timing)
        if stream:
            run.show(tokens, echo=echo)
        samples = run.collect(tokens, num_samples)
        document = run.document(samples, sampling, seed, max_tokens, timing)
        if as_json:
            echo_json(document)
        elif not stream:
            for number, sample in enumerate(samples):
                if num_samples > 1:
                    click.echo(f"--- {number + 1} of {num_samples}", err=True)
                click.echo((run.prompt_text if echo else "") + sample["text"])
        log.info("%d tokens, %s tokens/s, first one after %.3f s", *run.told(document))


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise UsageError("Give either `--prompt` or `--prompt-file`.", remedy="`--prompt ''` begins a line.")
    if prompt is not None:
        return prompt
    assert file is not None
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"The prompt in {file} is not UTF-8: {error}.") from error
    except OSError as error:
        raise UsageError(f"The prompt {file} cannot be read: {error.strerror}.") from error


def open_generator(
    stack: contextlib.ExitStack,
    checkpoint: Path | None,
    artifact: Path | None,
    prefill: tuple[Path, ...],
    runtime: str,
    lengths: Any,
    dtype: str | None,
    device: str,
    threads: int | None,
    segment_len: int,
) -> tuple[Opened, Generator]:
    """Open an artifact with those that read its prompts, or a checkpoint in a runtime."""
    from txl_deploy.generate import Generator
    from txl_deploy.opening import open_checkpoint, open_exported

    if artifact is not None:
        opened = open_exported(artifact, dtype=cast("Dtype | None", dtype), device=device, threads=threads)
        return opened, Generator(opened.runtime, [open_exported(path, device=device, threads=threads).runtime for path in prefill])
    assert checkpoint is not None
    opened = stack.enter_context(
        open_checkpoint(
            checkpoint,
            runtime=runtime,
            lengths=lengths,
            dtype=cast("Dtype | None", dtype),
            head="logits",
            device=device,
            threads=threads,
        )
    )
    return opened, Generator(opened.runtime, [opened.of_length(segment_len)] if segment_len > 1 else [])


class _Run:
    """One prompt and what comes of it."""

    def __init__(
        self, opened: Opened, generator: Generator, prompt: str, dataset: str | None, raw: bool, stops: tuple[str, ...], stop_at_eos: bool
    ) -> None:
        from txl_deploy.corpora import encode_prompt
        from txl_deploy.text_stream import RawTokens
        from txl_train.data.datasets import get_dataset
        from txl_train.data.detokenizers import Detokenizer

        data = opened.model_data
        self.opened, self.generator, self.prompt = opened, generator, prompt
        self.vocabulary = data.vocabulary
        self.ids, self.unknown = encode_prompt(data, prompt, dataset=dataset)
        spec = get_dataset(dataset or data.dataset)
        self.detokenizer = cast(Detokenizer, RawTokens(data.vocabulary)) if raw else Detokenizer(spec, data.vocabulary)
        self.prompt_text = self.detokenizer.text([int(i) for i in self.ids]) if prompt else ""
        self.stops, self.eos_id = stops, data.vocabulary.eos_id if stop_at_eos else None
        self.streams: dict[int, TextStream] = {}
        self.log_p: dict[int, list[float]] = {}
        self.reasons: dict[int, str] = {}
        if self.unknown:
            shown = ", ".join(dict.fromkeys(self.unknown[:5]))
            log.warning(
                "%d words of the prompt are unknown to the model: %s%s", len(self.unknown), shown, " ..." if len(self.unknown) > 5 else ""
            )

    def tokens(self, max_tokens: int, sampling: Sampling, seed: int, samples: int, timing: Timing) -> Any:
        """Yield the tokens, and keep the text of each sample."""
        from txl_deploy.text_stream import TextStream

        self.streams = {number: TextStream(self.detokenizer, self.ids.tolist(), stops=self.stops) for number in range(samples)}
        self.log_p = {number: [] for number in range(samples)}

        def ends(sample: int, token: int) -> str | None:
            stopped = self.streams[sample].take(token)
            return "stop" if stopped is not None else "eos" if token == self.eos_id else None

        for token in self.generator.go_on(
            self.ids, max_tokens=max_tokens, sampling=sampling, seed=seed, samples=samples, ends=ends, timing=timing
        ):
            self.log_p[token.sample].append(token.log_p)
            if token.end is not None:
                self.reasons[token.sample] = token.end
            yield token

    def show(self, tokens: Any, *, echo: bool) -> None:
        """Print the text of one sample as it comes."""
        if echo:
            click.echo(self.prompt_text, nl=False)
        token: Token
        for token in tokens:
            part = self.streams[0].fresh(ended=token.end is not None)
            if part:
                click.echo(part, nl=False)
                sys.stdout.flush()
        click.echo()

    def collect(self, tokens: Any, samples: int) -> list[dict[str, Any]]:
        """Take what tokens are left, and return all samples as plain values."""
        for _ in tokens:
            pass
        return [
            {
                "text": stream.text,
                "stop_reason": self.reasons[number],
                "stopped_by": stream.stopped_by,
                "token_ids": stream.ids,
                "tokens": self.vocabulary.decode(stream.ids),
                "log_p": self.log_p[number],
            }
            for number, stream in ((number, self.streams[number]) for number in range(samples))
        ]

    def document(self, samples: list[dict[str, Any]], sampling: Sampling, seed: int, max_tokens: int, timing: Timing) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        info = self.generator.step.info
        n_tokens = sum(len(sample["token_ids"]) for sample in samples)
        seconds = timing.prompt_s + sum(timing.steps_s)
        return {
            "command": command_line(),
            "prompt": self.prompt,
            "prompt_token_ids": [int(i) for i in self.ids],
            "unknown_words": self.unknown,
            "samples": samples,
            "settings": {
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
                "forbidden_ids": list(sampling.forbidden),
                "max_tokens": max_tokens,
                "stop": list(self.stops),
                "seed": seed,
            },
            "runtime": info.name,
            "provider": info.provider,
            "device": info.device,
            "dtype": info.dtype,
            "mem_len": info.mem_len,
            "clamp_len": info.config.clamp_len,
            "same_length": info.config.same_length,
            "segment_lens": [reader.info.tgt_len for reader in self.generator.readers] + [1],
            "checkpoint_sha256": info.checkpoint_sha256,
            "manifest_sha256": info.manifest_sha256,
            "time_to_first_token_s": timing.prompt_s,
            "tokens_per_s": n_tokens / seconds,
        }

    def told(self, document: dict[str, Any]) -> tuple[int, str, float]:
        """Return what the log says in the end."""
        n_tokens = sum(len(sample["token_ids"]) for sample in document["samples"])
        return n_tokens, f"{document['tokens_per_s']:,.1f}", document["time_to_first_token_s"]
