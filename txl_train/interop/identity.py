"""Evidence that an imported model is the model it was: it predicts text, and does so better with its clusters in this order than reversed.

The families disagree on which column of the head stands for which tail cluster, and the shapes are the same either way, so a wrong
order loads without a word. Text decides: a trained model gives tail words far less probability under the wrong order. That means
something only where the model has learned anything at all. That shows in the order of words, which it must predict better as they
stand than shuffled, or at least in their frequencies. A wrong vocabulary, mixed up weights, or weights never trained fail that.
"""

# Shape suffixes: B streams, T tokens of a segment, N tokens, C tail clusters

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from txl_train.config import ModelConfig
from txl_train.data import pydoc
from txl_train.data.corpus import encode_text
from txl_train.data.datasets import DatasetSpec
from txl_train.data.tokenizers import tokenize_raw
from txl_train.data.vocabulary import MISSING, Vocabulary
from txl_train.metrics import perplexity
from txl_train.model.adaptive import cluster_rows
from txl_train.model.transformer_xl import TransformerXL

Verdict = Literal["proved", "undecided", "contradicted"]
Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

MOST_TOKENS, FEWEST_TOKENS = 4096, 1024
"""How much text is scored, in tokens: less of it by a large model, for which tail words are more telling."""
TOKENS_TIMES_PARAMETERS = 3e11
STREAMS, SEGMENT = 8, 64
LONGEST_MEMORY = 128
"""Tokens; more would cost time and prove nothing more."""
STANDARD_ERRORS = 4.0
"""How many of them a difference must be to count: chance alone does that once in thirty thousand times."""
FEWEST_TAIL_TOKENS = 10
LEAST_GAIN_BY_ORDER = 0.05
"""Nats a token between the text and its tokens shuffled: less is no sign of learning, however certain it is."""
LEAST_GAIN_BY_FREQUENCY = 0.5
"""Nats a token between the model and one whose scores are all equal."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What scoring a text under both orders of the clusters showed."""

    verdict: Verdict
    reason: str
    """One sentence."""
    text: str
    """Which text: "built-in", or a path."""
    n_tokens: int
    """Tokens scored."""
    n_unknown: int
    """Of the text's tokens, how many the vocabulary lacks; they became `<unk>`, or were left out where there is none."""
    perplexity: float | None = None
    """With the clusters as imported. None where nothing could be scored."""
    perplexity_reversed: float | None = None
    """With the clusters in the other order; None also where there are fewer than two, which have only one order."""
    perplexity_shuffled: float | None = None
    """Of the same tokens in random order."""
    n_tail_tokens: int = 0
    """Scored tokens whose cluster has another column in the other order."""
    nats_per_tail_token: float | None = None
    """How much worse the other order is for them, on average."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not finite becomes None there."""
        return dataclasses.asdict(self)


def prove(config: ModelConfig, weights: Mapping[str, Tensor], ids: Ids, *, text: str, n_unknown: int) -> Identity:
    """Score `ids` (int64 [N]) and judge."""
    about = {"text": text, "n_unknown": n_unknown}
    if len(ids) < FEWEST_TOKENS // 2:
        reason = f"The vocabulary knows only {len(ids)} tokens of the text, too few to judge by."
        return Identity(verdict="undecided", reason=reason, n_tokens=0, **about)  # type: ignore[arg-type]  # mixed values
    scale = sum(weight.numel() for weight in weights.values())
    ids = ids[: 1 + int(min(MOST_TOKENS, max(FEWEST_TOKENS, TOKENS_TIMES_PARAMETERS / scale)))]
    model = _build(config, weights)
    nll_N, worse_N, targets_N = _score(model, ids)
    shuffled_N, _, _ = _score(model, np.random.default_rng(0).permutation(ids))
    moved_N = worse_N != 0.0
    worse = worse_N[moved_N]
    found = {
        **about,
        "n_tokens": len(nll_N),
        "perplexity": perplexity(float(nll_N.mean())),
        "perplexity_reversed": perplexity(float((nll_N + worse_N).mean())) if config.n_cluster > 1 else None,
        "perplexity_shuffled": perplexity(float(shuffled_N.mean())),
        "n_tail_tokens": len(worse),
        "nats_per_tail_token": float(worse.mean()) if len(worse) else None,
    }
    verdict, reason = _judge(config, nll_N, shuffled_N, _untrained(config, targets_N), worse)
    return Identity(verdict=verdict, reason=reason, **found)  # type: ignore[arg-type]  # mixed values


def _judge(config: ModelConfig, nll_N: Floats, shuffled_N: Floats, untrained_N: Floats, worse: Floats) -> tuple[Verdict, str]:
    """Judge by nll, of the text and of it shuffled, by that of a model of equal scores, and by what reversal costs the tail tokens."""
    if not (np.isfinite(nll_N).all() and np.isfinite(shuffled_N).all()):
        return "undecided", "Its losses are not finite."
    order = float(shuffled_N.mean() - nll_N.mean())
    error = math.sqrt((nll_N.var() + shuffled_N.var()) / len(nll_N))
    knows_order = order > max(STANDARD_ERRORS * error, LEAST_GAIN_BY_ORDER)
    frequencies = untrained_N - nll_N
    gain = float(frequencies.mean())
    knows_frequencies = gain > max(STANDARD_ERRORS * float(frequencies.std()) / math.sqrt(len(nll_N)), LEAST_GAIN_BY_FREQUENCY)
    if not (knows_order or knows_frequencies):
        return (
            "undecided",
            "It predicts this text no better than chance: untrained, trained on text of another kind, or another vocabulary.",
        )
    if knows_order:
        learned = f"It predicts the text {order:.2f} nats a token better than the same tokens shuffled"
    else:
        learned = f"It has learned how frequent tokens are ({gain:.2f} nats a token better than untrained), but hardly their order"
    if config.n_cluster < 2:
        if not knows_order:
            return "undecided", f"{learned}: too little to tell."
        return "proved", f"{learned}; with {config.n_cluster or 'no'} tail clusters there is no order to mistake."
    if len(worse) < FEWEST_TAIL_TOKENS:
        return "undecided", f"{learned}, and only {len(worse)} of its tokens tell the orders of the clusters apart."
    difference, error = float(worse.mean()), float(worse.std()) / math.sqrt(len(worse))
    by = f"{abs(difference):.2f} nats on each of {len(worse)} tokens of the tail clusters"
    if abs(difference) < STANDARD_ERRORS * error:
        return "undecided", f"{learned}; the two orders of its clusters differ by no more than chance: {by}."
    if difference > 0:
        return "proved", f"{learned}; the other order of its clusters is worse by {by}."
    if not knows_order:
        return "undecided", f"{learned}; its clusters' other order is better by {by}, which may be the text's doing."
    return "contradicted", f"{learned}, but better still with its clusters in the other order: by {by}."


def _untrained(config: ModelConfig, target_ids_N: Ids) -> Floats:
    """Return the nll of tokens where all scores are equal, of words and of clusters alike."""
    ends = np.array(config.cluster_ends)
    sizes = np.diff(ends).astype(np.float64)
    cluster_N = np.searchsorted(ends[1:], target_ids_N, side="right")
    of_tails = np.where(cluster_N > 0, np.log(sizes[cluster_N]), 0.0)
    nll_N: Floats = np.log(sizes[0] + config.n_cluster) + of_tails
    return nll_N


def _build(config: ModelConfig, weights: Mapping[str, Tensor]) -> TransformerXL:
    changed = dataclasses.replace(config, mem_len=min(config.mem_len, LONGEST_MEMORY), ext_len=0)
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are overwritten: leave the caller's generator alone
        model = TransformerXL(changed)
    model.load_parameters(dict(weights))
    return model.eval()


@torch.inference_mode()
def _score(model: TransformerXL, ids: Ids) -> tuple[Floats, Floats, Ids]:
    """Return of every token but the first its nll, how much larger that is with the clusters reversed (nats), and its id; [N] each."""
    rows = (len(ids) - 1) // STREAMS
    input_ids = torch.from_numpy(ids[: STREAMS * rows]).view(STREAMS, rows)
    target_ids = torch.from_numpy(ids[1 : STREAMS * rows + 1]).view(STREAMS, rows)
    memory = model.initial_memory(STREAMS)
    nll, worse, targets = [], [], []
    for start in range(0, rows, SEGMENT):
        hidden_BTD, memory = model(input_ids[:, start : start + SEGMENT], memory)
        for hidden_ND, target_ids_N in zip(hidden_BTD, target_ids[:, start : start + SEGMENT]):
            nll.append(model.head(hidden_ND, target_ids_N, cluster_rows(target_ids_N, model.head.cluster_ends)))
            worse.append(_cost_of_reversal(model, hidden_ND, target_ids_N))
            targets.append(target_ids_N)
    return torch.cat(nll).double().numpy(), torch.cat(worse).double().numpy(), torch.cat(targets).numpy()


def _cost_of_reversal(model: TransformerXL, hidden_ND: Tensor, target_ids_N: Tensor) -> Tensor:
    """Reversing the clusters leaves the head's normaliser as it is, so a token's nll changes by the difference of two columns."""
    if model.head.n_cluster < 2:
        return torch.zeros(len(hidden_ND))
    columns_NC = model.head.cluster_logits(hidden_ND)
    starts = torch.tensor(model.head.cluster_ends[1:-1])
    cluster_N = (target_ids_N[:, None] >= starts).sum(1) - 1  # -1: of the shortlist
    own_N1 = cluster_N.clamp(min=0)[:, None]
    cost_N = (columns_NC.gather(1, own_N1) - columns_NC.flip(1).gather(1, own_N1)).squeeze(1)
    return torch.where(cluster_N < 0, torch.zeros(()), cost_N)


def built_in_text(spec: DatasetSpec, vocabulary: Vocabulary) -> tuple[Ids, int]:
    """Return prose that comes with Python as ids of `vocabulary` (int64 [N], at most `MOST_TOKENS` + 1), and how many were unknown.

    Words are made as in WikiText; letters, bytes and subwords by their own rules. Unknown tokens become `<unk>`, or are left out where
    there is none. A Python without its help texts gives no ids.
    """
    if vocabulary.unit == "subword":
        return encode_text(list(itertools.islice(_prose(), MOST_TOKENS // 32)), spec, vocabulary)[: MOST_TOKENS + 1], 0
    tokens: list[str] = []
    for paragraph in _prose():
        if spec.unit == "word":
            tokens += [*pydoc.tokenize(paragraph), *([spec.line_token] if spec.line_token else [])]
        else:
            tokens += [*tokenize_raw(paragraph, spec.name), *_BLANKS[spec.layout]]
        if len(tokens) > MOST_TOKENS:
            break
    if spec.unit == "word" and "the" in vocabulary and "The" not in vocabulary:
        tokens = [token.lower() for token in tokens]
    ids = vocabulary.find(tokens[: MOST_TOKENS + 1])
    unknown = ids == MISSING
    n_unknown = int(unknown.sum())
    return (ids[~unknown] if vocabulary.unk_id is None else np.where(unknown, vocabulary.unk_id, ids)), n_unknown


_BLANKS: Mapping[str, tuple[str, ...]] = {"text8": ("_",), "enwik8": ("32",)}
"""How a blank is written, which stands between paragraphs of letters or bytes."""


def _prose() -> Iterator[str]:
    try:
        topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError):
        return
    for topic in sorted(topics):
        yield from pydoc.paragraphs(topics[topic])
