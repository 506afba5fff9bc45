"""Names and order of the weights: theirs to ours.

All families descend from one program, so one table serves them; where they differ, a weight has several names. Every tensor of the file is
used exactly once, or is an equal copy of one that is tied to it; anything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from txl_train.config import ModelConfig
from txl_train.errors import CheckpointError
from txl_train.interop.pickles import printable
from txl_train.interop.tensors import StoredTensor
from txl_train.model.adaptive import has_projections
from txl_train.model.transformer_xl import TransformerXL

_LAYER = {
    "dec_attn.o_net.weight": "attention.output.weight",
    "dec_attn.layer_norm.weight": "attention_norm.weight",
    "dec_attn.layer_norm.bias": "attention_norm.bias",
    "pos_ff.CoreNet.0.weight": "feed_forward.inner.weight",
    "pos_ff.CoreNet.0.bias": "feed_forward.inner.bias",
    "pos_ff.CoreNet.3.weight": "feed_forward.outer.weight",
    "pos_ff.CoreNet.3.bias": "feed_forward.outer.bias",
    "pos_ff.layer_norm.weight": "feed_forward_norm.weight",
    "pos_ff.layer_norm.bias": "feed_forward_norm.bias",
}


def map_weights(
    where: str, tensors: Mapping[str, StoredTensor], config: ModelConfig, *, clusters_reversed: bool, n_empty: int = 0
) -> dict[str, Tensor]:
    """Return the weights under the names of `TransformerXL.parameters_by_name`, float32, each once.

    The columns of `n_empty` clusters without words become words, the last ones of the shortlist (`foreign.make_config`).

    Raises:
        CheckpointError: a tensor is missing, left over, of the wrong shape or dtype, not finite, or not equal to its tied copy.
    """
    n_layer = len({name.split(".")[1] for name in tensors if name.startswith("layers.")})
    if config.n_layer != n_layer:
        raise CheckpointError(f"{where}: its configuration says that it has {config.n_layer} layers, but it holds tensors of {n_layer}.")
    file = _Tensors(where, tensors)
    weights: dict[str, Tensor] = {}
    clusters = range(config.n_cluster + 1)
    tables = clusters if config.div_val > 1 else range(1)
    for i in tables:
        of_head = (f"crit.out_layers.{i}.weight", f"crit.out_layers_weights.{i}")
        weights[f"embedding.weights.{i}"] = file.take(f"word_emb.emb_layers.{i}.weight", *(of_head if config.tie_weights else ()))
        if not config.tie_weights:
            weights[f"head.weights.{i}"] = file.take(*of_head)
        weights[f"head.biases.{i}"] = file.take(f"crit.out_layers.{i}.bias", f"crit.out_layers_biases.{i}")
    if has_projections(config):
        for i in tables:
            serves = [i] if config.div_val > 1 else list(clusters)
            tied = [f"crit.out_projs.{k}" for k in serves if config.projection_is_tied(k)]
            weights[f"embedding.projections.{i}"] = file.take(f"word_emb.emb_projs.{i}", f"crit.shared_out_projs.{i}", *tied)
        for i in clusters:
            if not config.projection_is_tied(i):
                weights[f"head.projections.{i}"] = file.take(f"crit.out_projs.{i}")
    _take_clusters(file, weights, config, clusters_reversed, n_empty)
    _take_positions(file, weights, config)
    for layer in range(config.n_layer):
        for theirs, ours in _LAYER.items():
            weights[f"layers.{layer}.{ours}"] = file.take(f"layers.{layer}.{theirs}")
    file.check_all_used()
    _check_shapes(where, weights, config, file.names_of(weights))
    return weights


def _take_clusters(file: _Tensors, weights: dict[str, Tensor], config: ModelConfig, clusters_reversed: bool, n_empty: int) -> None:
    weights["head.cluster_weight"], weights["head.cluster_bias"] = torch.zeros(0, config.embed_size), torch.zeros(0)
    if config.n_cluster + n_empty:
        for ours, theirs in (("head.cluster_weight", "crit.cluster_weight"), ("head.cluster_bias", "crit.cluster_bias")):
            weight = file.take(theirs)
            weights[ours] = weight.flip(0) if clusters_reversed else weight
    if n_empty:
        _move_empty_clusters(weights, config, n_empty)
        file.drop(f"crit.out_projs.{config.n_cluster + 1 + i}" for i in range(n_empty))


def _move_empty_clusters(weights: dict[str, Tensor], config: ModelConfig, n_empty: int) -> None:
    """Make words of the last `n_empty` clusters: nothing is ever embedded as one of them."""
    columns, biases = weights["head.cluster_weight"], weights["head.cluster_bias"]
    if len(columns) != len(biases) or len(columns) != config.n_cluster + n_empty or columns.shape[1:] != (config.embed_size,):
        return  # the check of shapes says it
    n_live, at = config.n_cluster, config.cluster_ends[1] - n_empty
    weights["head.cluster_weight"], weights["head.cluster_bias"] = columns[:n_live].clone(), biases[:n_live].clone()
    added = {"embedding.weights.0": columns[n_live:], "head.biases.0": biases[n_live:]}
    if not config.tie_weights:
        added = {
            "head.weights.0": columns[n_live:],
            "head.biases.0": biases[n_live:],
            "embedding.weights.0": torch.zeros(columns[n_live:].shape),
        }
    for name, rows in added.items():
        weights[name] = torch.cat([weights[name][:at], rows, weights[name][at:]])


def _take_positions(file: _Tensors, weights: dict[str, Tensor], config: ModelConfig) -> None:
    """Take the projections of queries, keys and values, and what the kind of attention keeps of positions."""
    names = [f"layers.{layer}.attention" for layer in range(config.n_layer)]
    for layer, ours in enumerate(names):
        theirs = f"layers.{layer}.dec_attn"
        if config.attn_type in ("relative", "shaw"):
            weights[f"{ours}.qkv.weight"] = file.take(f"{theirs}.qkv_net.weight")
        else:
            weights[f"{ours}.qkv.weight"] = torch.cat([file.take(f"{theirs}.q_net.weight"), file.take(f"{theirs}.kv_net.weight")])
    match config.attn_type:
        case "relative":
            for layer, ours in enumerate(names):
                weights[f"{ours}.position.weight"] = file.take(f"layers.{layer}.dec_attn.r_net.weight")
            _take_biases(file, weights, config, names)
        case "shaw":
            for kept, theirs in (("content_bias", "r_w_bias"), ("distance_keys", "r_emb"), ("distance_bias", "r_bias")):
                for ours, of_layer in zip(names, file.take_layers(theirs, config.n_layer)):
                    weights[f"{ours}.{kept}"] = of_layer
        case "learned":
            for ours, of_layer in zip(names, file.take_layers("r_emb", config.n_layer)):
                weights[f"{ours}.position_embedding"] = of_layer.flatten(1)
    if config.attn_type in ("relative", "sinusoidal"):
        file.check_frequencies(config.d_model)


def _take_biases(file: _Tensors, weights: dict[str, Tensor], config: ModelConfig, names: list[str]) -> None:
    for kept, theirs in (("content_bias", "r_w_bias"), ("position_bias", "r_r_bias")):
        of_layers = [f"layers.{layer}.dec_attn.{theirs}" for layer in range(config.n_layer)]
        if not config.untie_biases:
            weights[kept] = file.take(theirs, *of_layers)
            continue
        for ours, of_layer in zip(names, of_layers):
            weights[f"{ours}.{kept}"] = file.take(of_layer)


class _Tensors:
    """The tensors of a file that are not used yet."""

    def __init__(self, where: str, tensors: Mapping[str, StoredTensor]) -> None:
        self.where = where
        self.left = dict(tensors)
        self.used: dict[int, tuple[Tensor, str]] = {}
        """The tensors that were taken, by identity, and their names."""

    def take(self, *names: str) -> Tensor:
        """Return the tensor that has one of these names, float32. Where several are there, they must be equal: tied weights."""
        present = [name for name in names if name in self.left]
        if not present:
            wanted = " or ".join(f"`{name}`" for name in names[:2])
            raise CheckpointError(f"{self.where} has no tensor {wanted}, which its configuration asks for.")
        first, *copies = [self.left.pop(name) for name in present]
        weight = self._load(present[0], first)
        for name, copy in zip(present[1:], copies):
            if copy.identity != first.identity and not torch.equal(self._load(name, copy), weight):
                raise CheckpointError(
                    f"{self.where}: `{name}` should be `{present[0]}` once more, as its configuration says that they are tied, but differs."
                )
        self.used[id(weight)] = (weight, present[0])
        return weight

    def take_layers(self, name: str, n_layer: int) -> list[Tensor]:
        """Return the parts of a tensor that holds those of all layers, [n_layer, ...]."""
        whole = self.take(name)
        if whole.shape[:1] != (n_layer,):
            raise CheckpointError(f"{self.where}: `{name}` has shape {list(whole.shape)}, but there are {n_layer} layers.")
        return [part.clone() for part in whole]

    def _load(self, name: str, tensor: StoredTensor) -> Tensor:
        weight = tensor.load()
        if not weight.is_floating_point():
            raise CheckpointError(f"{self.where}: `{name}` holds {weight.dtype} numbers, which are no weights.")
        weight = weight.to(torch.float32)
        if not torch.isfinite(weight).all():
            raise CheckpointError(
                f"{self.where}: `{name}` holds numbers that are not finite: training diverged, or the file is damaged.",
                remedy="Import an earlier checkpoint.",
            )
        return weight

    def drop(self, names: Iterable[str]) -> None:
        """Leave out tensors that their own program never uses."""
        for name in names:
            self.left.pop(name, None)

    def check_frequencies(self, d_model: int) -> None:
        """Drop the sinusoids' frequencies, which are computed here, after seeing that they are the same; half precision rounds them."""
        if "pos_emb.inv_freq" in self.left:
            found = self._load("pos_emb.inv_freq", self.left.pop("pos_emb.inv_freq"))
            expected = 10000 ** -(torch.arange(0, d_model, 2, dtype=torch.float32) / d_model)
            if found.shape != expected.shape or not torch.allclose(found, expected, rtol=2e-3, atol=1e-7):
                raise CheckpointError(f"{self.where}: `pos_emb.inv_freq` differs from a Transformer-XL's frequencies of positions.")

    def check_all_used(self) -> None:
        """Refuse what is left."""
        if self.left:
            named = ", ".join(f"`{printable(name)}`" for name in sorted(self.left)[:5])
            more = f" and {len(self.left) - 5} more" if len(self.left) > 5 else ""
            raise CheckpointError(
                f"{self.where} holds tensors that nothing in its configuration uses: {named}{more}.",
                remedy="It is another model than its configuration says, or one that was changed; it cannot be imported as it is.",
            )

    def names_of(self, weights: Mapping[str, Tensor]) -> dict[str, str]:
        """Return our names to theirs, as far as a weight is one tensor of the file."""
        return {ours: self.used[id(weight)][1] if id(weight) in self.used else ours for ours, weight in weights.items()}


def _check_shapes(where: str, weights: Mapping[str, Tensor], config: ModelConfig, names: Mapping[str, str]) -> None:
    with torch.device("meta"):
        expected = {name: parameter.shape for name, parameter in TransformerXL(config).named_parameters()}
    assert expected.keys() == weights.keys(), "every weight is mapped"
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise CheckpointError(
                f"{where}: `{names[name]}` has shape {list(weights[name].shape)}, but its configuration asks for {list(shape)}."
            )
