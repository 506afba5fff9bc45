"""Values that float16 cannot hold are found in the FP32 model, at the point where they occur."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import ATTENTION_KINDS, build_model, small_config, words, write_corpus
from txl_deploy.corpora import ModelData
from txl_deploy.export.audit import AuditText, audit, audit_text, line
from txl_deploy.parity.rollout import random_segments
from txl_train.config import MemoryKind
from txl_train.data.vocabulary import Vocabulary
from txl_train.errors import DataError, UsageError, ValidationError
from txl_train.model.inference import InferenceStep
from txl_train.model.transformer_xl import TransformerXL

TGT_LEN = 5
CONFIG = small_config(cutoffs=(5, 9), div_val=2)


def random_text(config: Any, n_segments: int = 4) -> AuditText:
    segments = random_segments(config, tgt_len=TGT_LEN, n_segments=n_segments, batch_size=2)
    return AuditText(segments, {"kind": "random tokens", "reason": "a test"})


def audited(model: TransformerXL, memory: MemoryKind = "kv", dtype: Any = "fp16", memory_dtype: Any = "fp16") -> dict[str, Any]:
    text = random_text(model.config)
    return audit(model, model.config, text, tgt_len=TGT_LEN, memory=memory, dtype=dtype, memory_dtype=memory_dtype)


def point(result: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [found for found in result["points"] if found["point"] == name]
    return dict(found)


def scaled(name: str, factor: float, config: Any = CONFIG) -> TransformerXL:
    """Return a model with one weight scaled."""
    model = build_model(config)
    with torch.no_grad():
        dict(model.named_parameters())[name].mul_(factor)
    return model


def test_the_figures_are_those_of_a_computation_by_hand() -> None:
    """One layer, one token a segment, no memory: everything can be written down."""
    config = small_config(n_layer=1, mem_len=0)
    model = build_model(config)
    ids = np.array([[7]], dtype=np.int64)
    segment = dataclasses.replace(random_segments(config, tgt_len=1, n_segments=1, batch_size=1)[0], input_ids_BT=ids, target_ids_BT=ids)
    result = audit(
        model, config, AuditText([segment], {"kind": "random tokens"}), tgt_len=1, memory="kv", dtype="fp16", memory_dtype="fp16"
    )
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    layer = model.decoder_layers()[0]
    x = weights["embedding.weights.0"][7] * config.d_model**0.5
    query, key, value = (layer.attention.qkv.weight @ x).chunk(3)
    output = layer.attention.output.weight @ value  # one key: the weight is 1
    normal = layer.attention_norm(x + output)
    inner = layer.feed_forward.inner(normal)
    outer = layer.feed_forward.outer(inner.relu())
    hidden = layer.feed_forward_norm(normal + outer)
    heads = (config.n_head, config.d_head)
    content = (query.view(heads) + model.content_bias) * key.view(heads) * config.d_head**-0.5
    expected = {
        "embedding": weights["embedding.weights.0"][7],
        "attention input": x,
        "query": query,
        "query with content bias": query.view(heads) + model.content_bias,
        "key": key,
        "value": value,
        "content scores": content.sum(-1),
        "attention mix": value,
        "attention output": output,
        "feed-forward input": normal,
        "feed-forward inner": inner,
        "feed-forward outer": outer,
        "head input": hidden,
        "logits": model.head.logits(hidden[None], 0),
    }
    for name, values in expected.items():
        assert point(result, name)["largest"] == pytest.approx(float(values.detach().abs().max()), rel=1e-5), name
    sums = torch.stack([x + output, normal + outer]).detach().abs().max()
    assert point(result, "residual sum")["largest"] == pytest.approx(float(sums), rel=1e-5)
    largest = max(float(weight.abs().max()) for name, weight in weights.items() if weight.numel() and "norm." not in name)
    assert result["weights"]["largest"] == pytest.approx(largest)


@pytest.mark.parametrize("memory", ["kv", "hidden"])
@pytest.mark.parametrize(
    ("weight", "factor", "place"),
    [
        ("layers.1.attention.qkv.weight", 6e4, "of layer 1"),
        ("layers.1.feed_forward.inner.weight", 1e5, "feed-forward inner of layer 1"),
        ("layers.0.feed_forward.outer.weight", 1e5, "feed-forward outer of layer 0"),
        ("layers.0.attention.output.weight", 2e5, "attention output of layer 0"),
        ("head.biases.2", 1e7, "logits of cluster 2"),
        ("head.cluster_weight", 2e6, "logits of the clusters"),
    ],
)
def test_a_weight_that_is_too_large_overflows_where_it_is_used(memory: MemoryKind, weight: str, factor: float, place: str) -> None:
    model = scaled(weight, factor)
    if weight.startswith("head.cluster"):
        with torch.no_grad():
            model.head.cluster_weight.copy_(torch.ones_like(model.head.cluster_weight) * factor)
    with pytest.raises(ValidationError, match=place) as caught:
        audited(model, memory)
    assert caught.value.exit_code == 1
    assert "--dtype fp32" in (caught.value.remedy or "")
    assert "65504" in caught.value.message


def test_sums_that_stay_float32_may_be_as_large_as_they_like() -> None:
    model = build_model(small_config(pre_lnorm=True, n_layer=4))
    first, second, third, fourth = (layer.feed_forward.outer.bias for layer in model.decoder_layers())
    with torch.no_grad():
        for bias in (first, second, third):
            bias.fill_(4e4)
        fourth.fill_(-5e4)
        model.embedding.weights[0].mul_(1e-3)
    with pytest.raises(ValidationError, match="head input"):  # 70,000, which the head's product takes in float16
        audited(model)
    with torch.no_grad():
        fourth.fill_(-6.5e4)
    sums = point(audited(model), "residual sum")
    assert (sums["dtype"], sums["layer"]) == ("float32", 3)
    assert sums["largest"] == pytest.approx(12e4, rel=1e-3)


def test_hidden_states_overflow_only_where_the_memory_is_float16() -> None:
    """The memory of a model that normalises before keeps sums that are never normalised."""
    model = build_model(small_config(pre_lnorm=True, n_layer=4))
    with torch.no_grad():
        for layer, value in zip(model.decoder_layers(), (4e4, 4e4, -4e4, -4e4)):
            layer.feed_forward.outer.bias.fill_(value)
    result = audited(model, "hidden", memory_dtype="fp32")
    assert point(result, "memory")["largest"] == pytest.approx(8e4, rel=1e-3)
    assert point(result, "memory")["dtype"] == "float32"
    with pytest.raises(ValidationError, match="memory of layer 2") as caught:
        audited(model, "hidden", memory_dtype="fp16")
    assert "--memory-dtype fp32" in (caught.value.remedy or "")


def test_values_above_half_of_the_range_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = build_model(CONFIG)
    with torch.no_grad():
        model.decoder_layers()[0].feed_forward.outer.bias.fill_(4e4)
    with caplog.at_level(logging.WARNING):
        result = audited(model)
    assert "feed-forward outer of layer 0" in caplog.text
    assert result["worst"]["headroom"] == pytest.approx(65504 / 4e4, rel=1e-3)


def test_weights_too_small_for_float16_are_counted() -> None:
    model = build_model(small_config())
    with torch.no_grad():
        for layer, value in zip(model.decoder_layers(), (1e-9, 1e-5)):
            layer.feed_forward.inner.weight.fill_(value)
            layer.feed_forward.inner.bias.zero_()  # nothing is lost of a zero
    weights = audited(model)["weights"]
    n = 8 * 10
    assert weights["share_zero"] == pytest.approx(n / weights["n"])
    assert weights["share_subnormal"] == pytest.approx(n / weights["n"], rel=0.1)  # some of the others are small, too


@pytest.mark.parametrize("memory", ["kv", "hidden"])
def test_listening_changes_nothing(memory: MemoryKind) -> None:
    model = build_model(CONFIG)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    step = InferenceStep(model, TGT_LEN, memory).eval()
    segment = random_segments(CONFIG, tgt_len=TGT_LEN, n_segments=1, batch_size=2)[0]
    arguments = torch.from_numpy(segment.input_ids_BT), torch.from_numpy(segment.target_ids_BT)
    memory_B = step.initial_memory(2)
    rows = [torch.zeros(0, dtype=torch.int64)] * 2
    nll = step(*arguments, rows, memory_B.length_B, memory_B.states)[0]
    audited(model, memory)
    assert torch.equal(step(*arguments, rows, memory_B.length_B, memory_B.states)[0], nll)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    hooked = [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert hooked == []


@pytest.mark.parametrize(("kind", "memory"), [*((kind, "hidden") for kind in ATTENTION_KINDS), ("relative", "kv"), ("shaw", "kv")])
def test_every_kind_of_attention_is_audited(kind: str, memory: MemoryKind) -> None:
    result = audited(build_model(small_config(**ATTENTION_KINDS[kind], ext_len=3)), memory)
    position = point(result, "position scores")["largest"]
    assert (position > 0) == (kind in ("relative", "shaw"))
    total = point(result, "content scores")["largest"] + position
    assert 0 < point(result, "scores")["largest"] <= total
    assert point(result, "memory")["largest"] > 0
    added = [found["dtype"] for found in result["points"] if found["point"] == "added positions"]
    assert added == ([] if kind in ("relative", "shaw") else ["float32"])
    json.dumps(result, allow_nan=False)


# Which text


def model_data(folder: Path | None) -> ModelData:
    return ModelData("text", Vocabulary(words(CONFIG.vocab_size), unit="word"), None if folder is None else str(folder))


def test_the_text_is_what_the_checkpoint_was_trained_on(tmp_path: Path) -> None:
    text = audit_text(model_data(write_corpus(tmp_path / "data", CONFIG.vocab_size)), CONFIG, tgt_len=TGT_LEN)
    assert (text.description["kind"], text.description["split"]) == ("text", "valid")
    assert len(text.description["sha256"]) == 64
    assert len(text.segments) >= 3, "the memory of 7 tokens has to be full"
    assert all(segment.counted_BT.all() for segment in text.segments), "padding is no text"


def test_where_that_text_is_not_here_tokens_are_random_and_it_is_said(tmp_path: Path) -> None:
    text = audit_text(model_data(tmp_path / "gone"), CONFIG, tgt_len=TGT_LEN)
    assert text.description["kind"] == "random tokens"
    assert "no longer" in text.description["reason"]
    result = audit(build_model(CONFIG), CONFIG, text, tgt_len=TGT_LEN, memory="kv", dtype="fp16", memory_dtype="fp16")
    assert "random tokens" in line(result)


def test_a_folder_that_is_named_must_hold_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        audit_text(model_data(None), CONFIG, tgt_len=TGT_LEN, data=tmp_path / "gone")
    short = write_corpus(tmp_path / "short", CONFIG.vocab_size, n_lines=1)
    with pytest.raises(DataError, match="no text of more than 400 tokens"):
        audit_text(model_data(None), CONFIG, tgt_len=400, data=short)


def test_the_work_is_bounded_but_the_memory_is_filled() -> None:
    long = small_config(n_layer=6, mem_len=400)
    text = audit_text(model_data(None), long, tgt_len=8)
    assert text.segments[0].target_ids_BT.shape[0] * 8 * len(text.segments) <= 4096
    assert len(text.segments) * 8 > 400


def test_a_model_without_memory_has_nothing_in_float16_but_its_states() -> None:
    result = audited(build_model(small_config(mem_len=0)), dtype="fp32")
    assert result["worst"] is None
    assert line(result) == "Nothing is in float16: there is no memory."
