"""Reads NVIDIA's checkpoints: DeepLearningExamples, PyTorch/LanguageModeling/Transformer-XL, of 2019 and of 2020 to 2023.

One file of `torch.save`: the model's weights, its configuration, its vocabulary and the program's arguments, beside the state of
training. The two formats differ in the names of the output layers, and by them they are told apart; what else differs between them
(REFERENCE: `same_length` counts one key less in 2019) follows from that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from txl_train.errors import CheckpointError
from txl_train.interop.foreign import ATTENTION, Foreign, Lineage, Values, attributes, make_config, ordered, plain_values
from txl_train.interop.pickles import Names, inert
from txl_train.interop.tensors import StoredTensor

NAMES: Names = inert(
    "utils.vocabulary.Vocab",
    "utils.vocabulary.OpenAIVocab",
    "pytorch_transformers.tokenization_gpt2.GPT2Tokenizer",
    "_regex.compile",
    "regex._regex.compile",
)
"""What its files name besides tensors and plain values."""

_NOT_IMPORTED = {
    "optimizer_state": "the optimizer's state",
    "scheduler_state": "the scheduler's state",
    "amp_state": "the state of mixed precision",
    "rng_states": "the states of the random generators",
    "memory": "the memory of the training streams",
}


def is_nvidia(value: Any) -> bool:
    """True if this is what NVIDIA's program saves."""
    return isinstance(value, dict) and "model_state" in value and "model_config" in value


def read_nvidia(path: Path, value: dict[Any, Any]) -> Foreign:
    """Return the model of a checkpoint. Raises `CheckpointError` where something is missing or not understood."""
    where = str(path)
    state, model_config = value["model_state"], value["model_config"]
    if not isinstance(state, dict) or not isinstance(model_config, dict):
        raise CheckpointError(f"{where}: its `model_state` or `model_config` is no table.")
    tensors = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, StoredTensor):
            raise CheckpointError(f"{where}: its `model_state` holds something else than tensors.")
        tensors[name] = tensor
    if any(name.startswith("out_layer.") for name in tensors):
        raise CheckpointError(
            f"{where} was trained with a sampled softmax, with the scaled embedding as output matrix: NVIDIA's program cannot evaluate it."
        )
    lineage: Lineage = "nvidia-2019" if "crit.out_layers.0.bias" in tensors else "nvidia-2023"
    model = Values(model_config, f"{where}, model_config")
    arguments = attributes(value.get("args"), ("Namespace",), f"{where}: `args`") if value.get("args") is not None else {}
    program = Values(arguments, f"{where}, args")
    progress = Values(value, where)
    attn_type = model.integer("attn_type", high=3)
    lengths = {name: model.length(name, default=0) for name in ("tgt_len", "ext_len", "mem_len")}
    config, n_empty = make_config(
        where,
        vocab_size=model.integer("n_token", low=1),
        n_layer=model.integer("n_layer", low=1),
        n_head=model.integer("n_head", low=1),
        d_head=model.integer("d_head", low=1),
        d_model=model.integer("d_model", low=1),
        d_embed=model.integer("d_embed", low=1, default=model.integer("d_model", low=1)),
        d_inner=model.integer("d_inner", low=1),
        dropout=model.share("dropout"),
        dropatt=model.share("dropatt"),
        attn_type=ATTENTION[attn_type],
        position_rows=sum(lengths.values()) if attn_type in (1, 3) else 0,
        pre_lnorm=model.flag("pre_lnorm"),
        tie_weights=model.flag("tie_weight"),
        cutoffs=model.integers("cutoffs"),
        div_val=model.integer("div_val", low=1),
        tie_projections=model.flags("tie_projs"),
        mem_len=lengths["mem_len"],
        ext_len=lengths["ext_len"],
        clamp_len=model.optional_length("clamp_len"),
        same_length=model.flag("same_length"),
        same_length_rule="mem_len" if lineage == "nvidia-2019" else "mem_len+1",
    )
    return Foreign(
        family="nvidia",
        lineage=lineage,
        form=f"NVIDIA's checkpoint, format of {lineage.removeprefix('nvidia-')}",
        config=config,
        n_empty=n_empty,
        tensors=tensors,
        clusters_reversed=True,
        symbols=_symbols(where, value.get("vocab")),
        dataset=program.text("dataset"),
        data=program.text("data"),
        tgt_len=lengths["tgt_len"] or None,
        eval_tgt_len=program.optional_length("eval_tgt_len"),
        progress={
            "step": progress.integer("train_step", high=1 << 40, default=0),
            "epoch": progress.integer("epoch", high=1 << 40, default=1),
            "best_valid_nll": _loss(value.get("best_val_loss")),
        },
        arguments=plain_values(arguments),
        dropped=tuple(text for name, text in _NOT_IMPORTED.items() if value.get(name) is not None),
    )


def _loss(value: object) -> float | None:
    return float(value) if isinstance(value, float) and 0 <= value < 1e4 else None


def _symbols(where: str, vocab: object) -> tuple[str, ...] | None:
    """Return the tokens in the order of their ids: of words, or of GPT-2's subwords with the words that fill them up to a multiple of 8."""
    if vocab is None:
        return None
    entries = attributes(vocab, ("Vocab", "OpenAIVocab"), f"{where}: `vocab`")
    if "tokenizer" in entries:
        tokenizer = attributes(entries["tokenizer"], ("GPT2Tokenizer",), f"{where}: `vocab.tokenizer`")
        tables = [tokenizer.get("encoder"), tokenizer.get("added_tokens_encoder")]
        return ordered({symbol: i for table in tables if isinstance(table, dict) for symbol, i in table.items()}, f"{where}, vocab")
    symbols, ids = entries.get("idx2sym"), entries.get("sym2idx")
    if not isinstance(symbols, list) or not isinstance(ids, dict):
        raise CheckpointError(f"{where}: its vocabulary has no list of tokens `idx2sym` with a table `sym2idx`.")
    found = ordered(ids, f"{where}, vocab")
    if list(found) != symbols:
        raise CheckpointError(f"{where}: the two tables of its vocabulary, `idx2sym` and `sym2idx`, contradict each other.")
    return found
