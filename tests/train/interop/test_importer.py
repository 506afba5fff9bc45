"""Whole imports: every architecture of every family against the oracle, what proves a model, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.reference.naive_txl import random_parameters
from tests.reference.nvidia import load_nvidia_checkpoint
from tests.support import build_model, random_ids, small_config
from tests.train.interop.foreign_files import (
    bigram_model,
    classes,
    expected_nll,
    state_of,
    symbols,
    write_huggingface,
    write_kimiyoung,
    write_nvidia,
    write_nvidia_state,
    write_vocab_pkl,
)
from txl_train.checkpoint import Checkpoint, load_model, save_checkpoint
from txl_train.config import ModelConfig
from txl_train.data import bpe, pydoc
from txl_train.data.vocabulary import Vocabulary
from txl_train.errors import CheckpointError, UsageError
from txl_train.interop.importer import Imported, ImportRequest, import_checkpoint
from txl_train.interop.nvidia import NAMES, read_nvidia
from txl_train.interop.torch_files import TORCH, open_torch
from txl_train.interop.vocabularies import resolve_dataset
from txl_train.model.transformer_xl import TransformerXL

NLL_TOLERANCE = 5e-5
"""Nats; float32 against the oracle's float64, with scores of tens of nats."""

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "plain softmax": {},
    "adaptive softmax": {"cutoffs": (5, 9, 16)},
    "narrower tail clusters": {"cutoffs": (5, 9, 16), "div_val": 2},
    "embedding of another size": {"cutoffs": (5, 9), "d_embed": 6},
    "plain, embedding of another size": {"d_embed": 6, "tie_projections": (False,)},
    "no tied projection": {"cutoffs": (5, 9), "div_val": 2, "tie_projections": (False, False, False)},
    "every projection tied": {"cutoffs": (5, 9), "d_embed": 6, "tie_projections": (True, True, True)},
    "untied weights": {"cutoffs": (5, 9), "div_val": 2, "tie_weights": False},
    "untied weights, one table": {"cutoffs": (5, 9), "tie_weights": False},
    "normalised before": {"pre_lnorm": True},
    "clamped distances": {"clamp_len": 4},
    "no memory": {"mem_len": 0},
}
"""What all families can write."""

WITH_ATTENTION = {
    "shaw": {"attn_type": "shaw", "position_rows": 12},
    "sinusoidal": {"attn_type": "sinusoidal"},
    "learned": {"attn_type": "learned", "position_rows": 12, "d_head": 4},
}
"""What NVIDIA and the authors can write."""


def assert_same_model(imported: Imported, config: ModelConfig, parameters: dict[str, np.ndarray]) -> None:
    """Compare configuration and the nll of every token of two segments with the oracle's."""
    assert dataclasses.replace(imported.checkpoint.model_config, d_embed=config.d_embed, tie_projections=config.tie_projections) == config
    model = TransformerXL(imported.checkpoint.model_config)
    model.load_parameters(imported.checkpoint.model)
    model.eval()
    ids = random_ids(config, 1, 9)
    memory = model.initial_memory(1)
    parts = []
    with torch.inference_mode():
        for start in range(0, 8, 4):
            hidden, memory = model(torch.from_numpy(ids[:, start : start + 4]), memory)
            parts.append(model.nll(hidden, torch.from_numpy(ids[:, start + 1 : start + 5])))
    np.testing.assert_allclose(torch.cat(parts, dim=1).numpy(), expected_nll(config, parameters, ids, 4), atol=NLL_TOLERANCE)


@pytest.mark.parametrize("lineage", ["2019", "2023"])
@pytest.mark.parametrize("name", [*ARCHITECTURES, *WITH_ATTENTION])
def test_every_token_of_nvidias_checkpoint_scores_as_the_oracle_says(tmp_path: Path, name: str, lineage: str) -> None:
    rule = "mem_len" if lineage == "2019" else "mem_len+1"
    config = small_config(**{**ARCHITECTURES, **WITH_ATTENTION}[name], same_length_rule=rule)
    parameters = random_parameters(config, seed=1)
    write_nvidia(tmp_path / "c.pt", config, parameters, lineage=lineage)
    imported = import_checkpoint(ImportRequest(source=tmp_path / "c.pt"))
    assert imported.checkpoint.run["imported"]["lineage"] == f"nvidia-{lineage}"
    assert_same_model(imported, config, parameters)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", [*ARCHITECTURES, *WITH_ATTENTION])
def test_every_token_of_the_authors_pickled_module_scores_as_the_oracle_says(tmp_path: Path, name: str, legacy: bool) -> None:
    config = small_config(**{**ARCHITECTURES, **WITH_ATTENTION}[name], same_length_rule="mem_len")
    parameters = random_parameters(config, seed=2)
    write_kimiyoung(tmp_path / "model.pt", config, parameters, legacy=legacy)
    (tmp_path / "words.txt").write_text("\n".join(symbols(config.vocab_size)), encoding="utf-8")
    imported = import_checkpoint(ImportRequest(source=tmp_path / "model.pt", vocabulary=tmp_path / "words.txt"))
    assert imported.checkpoint.run["imported"]["family"] == "kimiyoung"
    assert_same_model(imported, config, parameters)


@pytest.mark.parametrize("untied", [True, False], ids=["biases of every layer", "shared biases"])
@pytest.mark.parametrize("form", ["safetensors", "bin", "legacy bin"])
@pytest.mark.parametrize("name", ["adaptive softmax", "narrower tail clusters", "every projection tied", "untied weights"])
def test_every_token_of_hugging_faces_folder_scores_as_the_oracle_says(tmp_path: Path, name: str, form: Any, untied: bool) -> None:
    config = small_config(**ARCHITECTURES[name], untie_biases=untied, same_length_rule="mem_len")
    parameters = random_parameters(config, seed=3)
    write_huggingface(tmp_path, config, parameters, form=form)
    assert_same_model(import_checkpoint(ImportRequest(source=tmp_path)), config, parameters)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ("adaptive softmax", "narrower tail clusters")])
def test_hugging_faces_other_architectures_are_read_too(tmp_path: Path, name: str) -> None:
    config = small_config(**ARCHITECTURES[name], untie_biases=True, same_length_rule="mem_len")
    parameters = random_parameters(config, seed=3)
    write_huggingface(tmp_path, config, parameters)
    assert_same_model(import_checkpoint(ImportRequest(source=tmp_path)), config, parameters)


@pytest.mark.parametrize(("lineage", "rule"), [("2019", "mem_len"), ("2023", "mem_len+1")])
def test_same_length_means_what_it_meant_where_the_model_was_trained(tmp_path: Path, lineage: str, rule: Any) -> None:
    config = small_config(same_length=True, same_length_rule=rule, mem_len=3)
    parameters = random_parameters(config, seed=4)
    write_nvidia(tmp_path / "c.pt", config, parameters, lineage=lineage)
    assert_same_model(import_checkpoint(ImportRequest(source=tmp_path / "c.pt")), config, parameters)


def test_the_same_parameters_come_out_of_an_independent_reader(reference_cases: Path) -> None:
    for path in sorted((reference_cases / "checkpoints").iterdir()):
        imported = import_checkpoint(ImportRequest(source=path))
        expected = load_nvidia_checkpoint(path)
        checkpoint = imported.checkpoint
        assert dataclasses.replace(checkpoint.model_config, ext_len=0) == expected.config
        assert list(checkpoint.vocabulary.symbols) == expected.symbols
        for name, weight in build_model(expected.config, expected.parameters).parameters_by_name().items():
            assert torch.equal(checkpoint.model[name], weight), name
        assert imported.identity.verdict == "proved"
        assert checkpoint.progress["step"] > 0


def test_the_result_is_an_ordinary_checkpoint_that_says_where_it_comes_from(tmp_path: Path) -> None:
    config = small_config(cutoffs=(5, 9))
    write_nvidia(tmp_path / "c.pt", config, random_parameters(config, seed=1))
    imported = import_checkpoint(ImportRequest(source=tmp_path / "c.pt"))
    save_checkpoint(tmp_path / "ours.pt", imported.checkpoint)
    model, loaded = load_model(tmp_path / "ours.pt")
    assert model.config == imported.checkpoint.model_config
    assert loaded.eval_tgt_len == 4
    assert loaded.settings == {"data": {"dataset": "wt103"}, "train": {"tgt_len": 5, "eval_tgt_len": 4}}
    assert loaded.progress == {"step": 30, "epoch": 2, "best_valid_nll": 3.25}
    record = loaded.run["imported"]
    assert record["arguments"]["lr"] == 0.01
    assert record["form"] == "NVIDIA's checkpoint, format of 2023"
    assert len(record["sha256"]["c.pt"]) == 64
    assert record["identity"]["verdict"] == "undecided"
    assert any("the memory of the training streams" in note for note in record["notes"])


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    config = small_config(cutoffs=(5, 9))
    state = state_of(config, random_parameters(config, seed=1), "nvidia-2023")
    write_nvidia_state(tmp_path / "c.pt", config, {name: tensor.half() for name, tensor in state.items()})
    weights = import_checkpoint(ImportRequest(source=tmp_path / "c.pt")).checkpoint.model
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert torch.equal(weights["content_bias"], state["r_w_bias"].half().float())


@pytest.mark.parametrize("cutoffs", [(5, 9, 40), (5, 30, 40), (30, 40, 50)], ids=["one", "two", "all"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_clusters_without_words_keep_their_share_of_the_softmax(tmp_path: Path, cutoffs: tuple[int, ...], tied: bool) -> None:
    """Their program's cutoffs are fixed: a small vocabulary leaves clusters empty, whose columns count all the same."""
    live = tuple(cutoff for cutoff in cutoffs if cutoff < 23)
    n_empty = 3 - len(live)
    config = small_config(cutoffs=live, tie_weights=tied)
    config = dataclasses.replace(config, adaptive=bool(live))
    parameters = random_parameters(config, seed=5)
    columns = np.random.default_rng(6).normal(size=(3, 9))
    state = state_of(config, parameters, "nvidia-2023")
    state["crit.cluster_weight"] = torch.from_numpy(columns[:, :8]).float()
    state["crit.cluster_bias"] = torch.from_numpy(columns[:, 8]).float()
    if live:
        parameters["head.cluster_weight"], parameters["head.cluster_bias"] = columns[::-1][: len(live), :8], columns[::-1][: len(live), 8]
    write_nvidia_state(tmp_path / "c.pt", config, state, changes={"cutoffs": list(cutoffs), "tie_projs": [False, True, True, True]})
    checkpoint = import_checkpoint(ImportRequest(source=tmp_path / "c.pt")).checkpoint
    assert sum(symbol.startswith("<empty-cluster-") for symbol in checkpoint.vocabulary.symbols) == n_empty
    model = TransformerXL(checkpoint.model_config)
    model.load_parameters(checkpoint.model)
    model.eval()
    numbers = checkpoint.vocabulary.encode(symbols(23))
    with torch.inference_mode():
        hidden, _ = model(torch.from_numpy(numbers[None, :6]), model.initial_memory(1))
        log_probs = model.log_probs(hidden)[0][:, torch.from_numpy(numbers)].double().numpy()
    original = build_model(config, parameters)
    with torch.inference_mode():
        hidden, _ = original(torch.arange(6)[None], original.initial_memory(1))
        plain = original.log_probs(hidden)[0].double().numpy()
        of_first_word = original.head.logits(hidden[0], 0)[:, 0].double().numpy()
    # the empty clusters' columns enlarge the head's normaliser, by the same amount for every word of a position
    share = hidden[0].double().numpy() @ columns[::-1][len(live) :, :8].T + columns[::-1][len(live) :, 8]
    normaliser = of_first_word - plain[:, 0]
    larger = np.log(np.exp(normaliser) + np.exp(share).sum(axis=1)) - normaliser
    np.testing.assert_allclose(log_probs, plain - larger[:, None], atol=NLL_TOLERANCE)


def test_nvidias_bpe_vocabulary_is_gpt2s_with_words_that_fill_it_up(tmp_path: Path) -> None:
    table = {symbol: i for i, symbol in enumerate(bpe.vocabulary().symbols)}
    config = small_config(vocab_size=50264)
    with classes("utils.vocabulary.OpenAIVocab", "pytorch_transformers.tokenization_gpt2.GPT2Tokenizer") as made:
        vocab, tokenizer = made.OpenAIVocab(), made.GPT2Tokenizer()
        tokenizer.encoder, tokenizer.bpe_ranks, tokenizer.cache = table, {("a", "b"): 0}, {}
        tokenizer.added_tokens_encoder = {f"madeupword{i:09d}": 50257 + i for i in range(7)}
        vocab.tokenizer, vocab.EOT = tokenizer, 50256
        write_nvidia_state(tmp_path / "c.pt", config, {"r_w_bias": torch.ones(2, 3)}, vocab=vocab)
    with open_torch(tmp_path / "c.pt", {**TORCH, **NAMES}) as value:
        foreign = read_nvidia(tmp_path / "c.pt", value)
    assert foreign.symbols is not None
    assert foreign.symbols[:50257] == bpe.vocabulary().symbols
    assert foreign.symbols[50257:] == tuple(f"madeupword{i:09d}" for i in range(7))
    assert resolve_dataset(None, None, foreign.symbols) == "wt103"


@pytest.mark.parametrize(
    ("dataset", "words", "unit"), [("text8", list("_etaoinshrdlu"), "char"), ("enwik8", [str(i) for i in range(32, 45)], "byte")]
)
def test_letters_and_bytes_keep_their_kind(tmp_path: Path, dataset: str, words: list[str], unit: str) -> None:
    config = small_config(vocab_size=13)
    state = state_of(config, random_parameters(config), "nvidia-2023")
    write_nvidia_state(tmp_path / "c.pt", config, state, words=words, arguments={"dataset": dataset})
    checkpoint = import_checkpoint(ImportRequest(source=tmp_path / "c.pt")).checkpoint
    assert (checkpoint.dataset, checkpoint.vocabulary.unit, list(checkpoint.vocabulary.symbols)) == (dataset, unit, words)


# What proves that it is the same model


def test_a_model_that_knows_the_text_is_proved_and_its_wrong_order_contradicted(tmp_path: Path) -> None:
    config, parameters, words = bigram_model()
    write_nvidia(tmp_path / "c.pt", config, parameters, words=words)
    right = import_checkpoint(ImportRequest(source=tmp_path / "c.pt")).identity
    assert right.verdict == "proved"
    assert right.perplexity is not None
    assert right.perplexity_reversed is not None
    assert right.perplexity_shuffled is not None
    assert right.perplexity < right.perplexity_reversed
    assert right.perplexity < 0.6 * right.perplexity_shuffled
    wrong = import_checkpoint(ImportRequest(source=tmp_path / "c.pt", reverse_clusters=True)).identity
    assert wrong.verdict == "contradicted"
    assert wrong.perplexity == pytest.approx(right.perplexity_reversed)
    assert wrong.perplexity_reversed == pytest.approx(right.perplexity)


def test_a_hugging_face_model_is_proved_with_its_own_order(tmp_path: Path) -> None:
    config, parameters, words = bigram_model()
    write_huggingface(tmp_path, config, parameters, words=words)
    assert import_checkpoint(ImportRequest(source=tmp_path)).identity.verdict == "proved"


def test_without_tail_clusters_the_order_of_words_is_the_proof(tmp_path: Path) -> None:
    config, parameters, words = bigram_model(cutoffs=())
    write_nvidia(tmp_path / "c.pt", config, parameters, words=words)
    identity = import_checkpoint(ImportRequest(source=tmp_path / "c.pt")).identity
    assert identity.verdict == "proved"
    assert identity.perplexity_reversed is None
    assert "no order to mistake" in identity.reason


def test_another_vocabulary_proves_nothing(tmp_path: Path) -> None:
    config, parameters, words = bigram_model()
    write_nvidia(tmp_path / "c.pt", config, parameters, words=[words[0], *reversed(words[1:])])
    identity = import_checkpoint(ImportRequest(source=tmp_path / "c.pt")).identity
    assert identity.verdict == "undecided"
    assert "no better than chance" in identity.reason


def test_untrained_weights_prove_nothing(tmp_path: Path) -> None:
    config, _, words = bigram_model()
    write_nvidia(tmp_path / "c.pt", config, random_parameters(config, seed=9), words=words)
    assert import_checkpoint(ImportRequest(source=tmp_path / "c.pt")).identity.verdict == "undecided"


def test_where_the_built_in_text_says_nothing_the_models_own_text_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TXL_CACHE_DIR", str(tmp_path / "cache"))
    config, parameters, words = bigram_model()
    renamed = ["<eos>", "<unk>", *(f"x{i}" for i in range(len(words) - 2))]
    table = dict(zip(words, renamed))
    write_nvidia(tmp_path / "c.pt", config, parameters, words=renamed)
    pydoc.build(tmp_path / "pydoc")
    (tmp_path / "data").mkdir()
    for name in ("train.txt", "valid.txt", "test.txt"):
        lines = (tmp_path / "pydoc" / name).read_text(encoding="utf-8").splitlines()
        text = "\n".join(" ".join(table.get(word, "<unk>") for word in line.split()) for line in lines)
        (tmp_path / "data" / name).write_text(text + "\n", encoding="utf-8")
    without = import_checkpoint(ImportRequest(source=tmp_path / "c.pt"))
    assert without.identity.verdict == "undecided"
    assert without.checkpoint.data_folder is None
    with_text = import_checkpoint(ImportRequest(source=tmp_path / "c.pt", data=tmp_path / "data"))
    assert with_text.identity.verdict == "proved"
    assert with_text.identity.text.endswith("valid.txt")
    assert with_text.checkpoint.data_folder == str(tmp_path / "data")


# What is refused, and how


def message_of(request: ImportRequest, kind: type[Exception] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        import_checkpoint(request)
    return str(caught.value)


def test_a_tensor_that_nothing_uses_is_refused_by_name(tmp_path: Path) -> None:
    config = small_config(cutoffs=(5, 9))
    state = state_of(config, random_parameters(config), "nvidia-2023") | {"adapter.weight": torch.ones(2)}
    write_nvidia_state(tmp_path / "c.pt", config, state)
    assert "`adapter.weight`" in message_of(ImportRequest(source=tmp_path / "c.pt"))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    config = small_config(cutoffs=(5, 9))
    state = state_of(config, random_parameters(config), "nvidia-2023")
    del state["layers.1.dec_attn.r_net.weight"]
    write_nvidia_state(tmp_path / "c.pt", config, state)
    assert "has no tensor `layers.1.dec_attn.r_net.weight`" in message_of(ImportRequest(source=tmp_path / "c.pt"))


def test_a_copy_that_should_be_tied_but_differs_is_refused(tmp_path: Path) -> None:
    config = small_config(cutoffs=(5, 9))
    state = state_of(config, random_parameters(config), "nvidia-2019")
    state["crit.out_layers.0.weight"] = state["crit.out_layers.0.weight"] + 1e-6
    write_nvidia_state(tmp_path / "c.pt", config, state, lineage="2019")
    message = message_of(ImportRequest(source=tmp_path / "c.pt"))
    assert "`crit.out_layers.0.weight` should be `word_emb.emb_layers.0.weight` once more" in message


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("r_w_bias", lambda t: t[:1], "`r_w_bias` has shape [1, 3]"),
        ("r_w_bias", lambda t: t.long(), "torch.int64 numbers, which are no weights"),
        ("r_w_bias", lambda t: t * float("nan"), "not finite"),
        ("pos_emb.inv_freq", lambda t: t * 2, "differs from a Transformer-XL's frequencies"),
    ],
)
def test_weights_that_cannot_be_right_are_refused_by_name(tmp_path: Path, name: str, change: Any, expected: str) -> None:
    config = small_config()
    state = state_of(config, random_parameters(config), "nvidia-2023")
    state[name] = change(state[name])
    write_nvidia_state(tmp_path / "c.pt", config, state)
    assert expected in message_of(ImportRequest(source=tmp_path / "c.pt"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"n_layer": 10**9}, "1000000000 layers, but it holds tensors of 2"),
        ({"n_layer": 10**12}, "`n_layer` is 1000000000000"),
        ({"n_head": -1}, "`n_head` is -1"),
        ({"d_model": True}, "`d_model` is True"),
        ({"mem_len": 10**9}, "`mem_len` is 1000000000"),
        ({"dropout": float("nan")}, "`dropout` is nan"),
        ({"cutoffs": [[[]]]}, "`cutoffs` is (a list)"),
        ({"cutoffs": [9, 5]}, "strictly increasing"),
        ({"attn_type": 4}, "`attn_type` is 4"),
        ({"tie_weight": None}, "`tie_weight` is missing"),
        ({"same_length": "yes"}, "`same_length` is 'yes'"),
    ],
)
def test_a_configuration_that_cannot_be_right_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    config = small_config(cutoffs=(5, 9))
    write_nvidia_state(tmp_path / "c.pt", config, state_of(config, random_parameters(config), "nvidia-2023"), changes=changes)
    assert expected in message_of(ImportRequest(source=tmp_path / "c.pt"))


def test_a_model_trained_with_a_sampled_softmax_is_refused_with_the_reason(tmp_path: Path) -> None:
    config = small_config()
    write_nvidia_state(tmp_path / "c.pt", config, {"out_layer.weight": torch.ones(23, 8), "out_layer.bias": torch.ones(23)})
    assert "sampled softmax" in message_of(ImportRequest(source=tmp_path / "c.pt"))


def test_a_file_of_another_family_than_asked_for_is_named(tmp_path: Path) -> None:
    config = small_config()
    write_nvidia(tmp_path / "c.pt", config, random_parameters(config))
    message = message_of(ImportRequest(source=tmp_path / "c.pt", format="kimiyoung"), UsageError)
    assert "is NVIDIA's checkpoint, not the authors'" in message
    assert "--from nvidia" in message


def test_what_is_no_foreign_model_is_said_to_be_what_it_is(tmp_path: Path) -> None:
    config = small_config()
    model = build_model(config)
    words = Vocabulary(symbols(config.vocab_size), unit="word")
    ours = Checkpoint(model_config=config, model=model.parameters_by_name(), vocabulary=words, dataset="text", run={}, progress={"step": 0})
    save_checkpoint(tmp_path / "ours.pt", ours)
    assert "is a checkpoint of txl already" in message_of(ImportRequest(source=tmp_path / "ours.pt"))
    torch.save({"a": torch.ones(1)}, tmp_path / "tensors.pt")
    assert "without a configuration" in message_of(ImportRequest(source=tmp_path / "tensors.pt"))
    torch.save({"state": {}, "param_groups": []}, tmp_path / "optimizer.pt")
    assert "optimizer.pt holds no model" in message_of(ImportRequest(source=tmp_path / "optimizer.pt"))
    assert "There is no" in message_of(ImportRequest(source=tmp_path / "nothing.pt"), UsageError)
    assert "Name a file: optimizer.pt, ours.pt, tensors.pt" in message_of(ImportRequest(source=tmp_path), UsageError)


def test_a_model_without_a_vocabulary_asks_for_one(tmp_path: Path) -> None:
    config = small_config()
    write_kimiyoung(tmp_path / "model.pt", config, random_parameters(config))
    message = message_of(ImportRequest(source=tmp_path / "model.pt"), UsageError)
    assert "holds no vocabulary" in message
    assert "--vocab FILE" in message


def test_the_authors_folder_is_as_good_as_the_model_in_it(tmp_path: Path) -> None:
    config = small_config(same_length_rule="mem_len")
    parameters = random_parameters(config)
    write_kimiyoung(tmp_path / "model.pt", config, parameters)
    (tmp_path / "words.txt").write_text("\n".join(symbols(23)), encoding="utf-8")
    assert_same_model(import_checkpoint(ImportRequest(source=tmp_path, vocabulary=tmp_path / "words.txt")), config, parameters)


def test_the_vocabulary_is_counted_where_the_text_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TXL_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train.txt", "valid.txt", "test.txt"):
        (folder / name).write_text("".join(f"{word}\n" * (30 - i) for i, word in enumerate(symbols(23)[1:])), encoding="utf-8")
    config = small_config(same_length_rule="mem_len")
    write_kimiyoung(tmp_path / "model.pt", config, random_parameters(config))
    checkpoint = import_checkpoint(ImportRequest(source=tmp_path / "model.pt", data=folder, dataset="wt103")).checkpoint
    assert list(checkpoint.vocabulary.symbols) == symbols(23)
    assert checkpoint.data_folder == str(folder)


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    config = small_config()
    write_nvidia(tmp_path / "c.pt", config, random_parameters(config), words=symbols(22))
    assert "a vocabulary of 22 tokens, but the model has 23" in message_of(ImportRequest(source=tmp_path / "c.pt"))


def test_a_token_beyond_the_embedding_is_left_out_and_told(tmp_path: Path) -> None:
    config = small_config(untie_biases=True)
    write_huggingface(tmp_path, config, random_parameters(config))
    imported = import_checkpoint(ImportRequest(source=tmp_path))
    assert list(imported.checkpoint.vocabulary.symbols) == symbols(23)
    assert any("`<formula>`" in note for note in imported.notes)
    write_vocab_pkl(tmp_path / "vocab.pkl", symbols(23), plain=True)
    assert not any("`<formula>`" in note for note in import_checkpoint(ImportRequest(source=tmp_path)).notes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({"attn_type": 1}, "attn_type other than 0"),
        ({"layer_norm_epsilon": 1e-6}, "epsilon of 1e-06"),
        ({"n_layer": 3}, "3 layers, but it holds tensors of 2"),
        ({"div_val": 0}, "`div_val` is 0"),
    ],
)
def test_a_hugging_face_configuration_that_cannot_be_met_is_refused(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    config = small_config(untie_biases=True)
    write_huggingface(tmp_path, config, random_parameters(config), changes=changes)
    assert expected in message_of(ImportRequest(source=tmp_path))


def test_hugging_faces_sharded_and_tensorflow_weights_are_refused_with_what_to_do(tmp_path: Path) -> None:
    config = small_config(untie_biases=True)
    write_huggingface(tmp_path, config, random_parameters(config))
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "max_shard_size" in message_of(ImportRequest(source=tmp_path), UsageError)
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "tf_model.h5")
    assert "from_tf=True" in message_of(ImportRequest(source=tmp_path), UsageError)


def test_absolute_positions_are_imported_with_a_warning_that_the_originals_are_wrong(tmp_path: Path) -> None:
    config = small_config(attn_type="sinusoidal")
    write_nvidia(tmp_path / "c.pt", config, random_parameters(config))
    assert any("computed wrongly by the original" in note for note in import_checkpoint(ImportRequest(source=tmp_path / "c.pt")).notes)
