"""`txl train` with the step of NVIDIA's Transformer-XL (DeepLearningExamples, 2023): the opponent of the training benchmarks.

    python benchmarks/reference_training.py train --config wt103-base --data DIR --dtype fp16     options, files as of `txl train`

All that is around the step stays: first weights, order of the text, schedule, loss scale, clipping, log. The step is the original's:

* time-first tensors; queries, keys and values of memory and segment alike projected, the mask made anew in every call;
* scores re-aligned by a column of zeros, a concatenation and a view, and masked by filling;
* the head matrix concatenated and the rows of each cluster found on the device, which the host waits for, in every step;
* the memory by stacking, concatenating and slicing;
* LAMB in TorchScript, one parameter after the other; the loss read in every step.

Forward pass and softmax are those of `reference_style`, with dropout put where the original has it. What this does without is refused:
parts of a batch, several devices and processes, `div_val` and `dropatt` (1 and 0 in the base recipe), other kinds of attention. A CPU's
autocast would compute the softmax in half, unlike a GPU's, so on a CPU it is computed in float32.
"""

# Shape suffixes: as in reference_style

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from reference_style import ReferenceLayer, ReferenceModel
from torch import Tensor, nn

from txl_deploy.cli import main as cli
from txl_train import run
from txl_train.callbacks import StepReport
from txl_train.config import ModelConfig
from txl_train.errors import ConfigError
from txl_train.model.memory import Memory
from txl_train.model.transformer_xl import DecoderLayer, TransformerXL
from txl_train.optim.lamb import Lamb
from txl_train.parallel import Engine
from txl_train.precision import Precision
from txl_train.trainer import Trainer


def _lamb_update(
    weight: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_weight_norm: float,
    lr: float,
) -> Tensor:
    """Move one weight, as the original's `lamb_kernel` does."""
    mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    update = mean / (square.sqrt() + eps) + weight_decay * weight
    weight_norm = weight.norm().clamp(max=max_weight_norm)
    update_norm = update.norm()
    trust = torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / (update_norm + eps), torch.ones_like(weight_norm))
    weight.sub_(update * trust * lr)
    return weight


class ReferenceLamb(Lamb):
    """LAMB by a scripted function for each parameter."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, foreach=False, **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is deprecated since 2.13, and what the original runs in
            self._update: Any = torch.jit.script(_lamb_update)

    def _step_one(self, group: dict[str, Any], weight: Tensor) -> None:
        mean, square = self.state[weight]["exp_avg"], self.state[weight]["exp_avg_sq"]
        settings = (float(group[name]) for name in ("eps", "weight_decay", "max_weight_norm", "lr"))
        self._update(weight, weight.grad, mean, square, *group["betas"], *settings)


class TrainingLayer(ReferenceLayer):
    """A layer with dropout."""

    def __init__(self, config: ModelConfig, layer: DecoderLayer) -> None:
        super().__init__(config, layer)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x_TBD: Tensor, memory_SBD: Tensor, encoded_KD: Tensor, hidden_TK: Tensor) -> Tensor:
        """Return the layer's output [T, B, D]."""
        seen_KBD = torch.cat([memory_SBD, x_TBD], dim=0)
        if self.pre_lnorm:
            seen_KBD = self.attention_norm(seen_KBD)
        mixed_TBD = self.drop(self.attend(seen_KBD, encoded_KD, hidden_TK, x_TBD.shape[0]))
        if self.pre_lnorm:
            x_TBD = x_TBD + mixed_TBD
            return x_TBD + self._feed_forward(self.feed_forward_norm(x_TBD))
        x_TBD = self.attention_norm(x_TBD + mixed_TBD)
        out_TBD: Tensor = self.feed_forward_norm(x_TBD + self._feed_forward(x_TBD))
        return out_TBD

    def _feed_forward(self, x_TBD: Tensor) -> Tensor:
        out_TBD: Tensor = self.drop(self.outer(self.drop(torch.relu_(self.inner(x_TBD)))))
        return out_TBD


class TrainingModel(ReferenceModel):
    """The original's model as it is trained, over the weights of ours."""

    def __init__(self, model: TransformerXL) -> None:
        super().__init__(model, model.config)
        self.layers = nn.ModuleList(TrainingLayer(model.config, layer) for layer in model.decoder_layers())
        self.drop = nn.Dropout(model.config.dropout)

    def forward(self, input_ids_TB: Tensor, target_ids_TB: Tensor, memory_LSBD: Tensor) -> tuple[Tensor, Tensor]:
        """Return nll [T, B] and the memory [L, S', B, D] of S' = min(S + T, M) positions."""
        x_TBD = self.drop(self.embedding(input_ids_TB))
        T, S = input_ids_TB.shape[0], memory_LSBD.shape[1]
        hidden_TK = self.hidden_keys(T, S, x_TBD)
        encoded_KD = self.drop(self.encode_distances(S + T, x_TBD))
        inputs: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            inputs.append(x_TBD)
            x_TBD = layer(x_TBD, memory_LSBD[i], encoded_KD, hidden_TK)
        with torch.no_grad():
            extended = torch.cat([memory_LSBD, torch.stack(inputs)], dim=1)
            new_memory = extended[:, max(0, S + T - self.mem_len) :]
        x_TBD = self.drop(x_TBD)
        half = torch.is_autocast_enabled(x_TBD.device.type) and x_TBD.is_cuda
        with torch.autocast(x_TBD.device.type, enabled=half):
            nll_N = self.softmax(x_TBD.reshape(-1, x_TBD.shape[2]), target_ids_TB.reshape(-1))
        return nll_N.view(T, -1), new_memory


class ReferenceEngine(Engine):
    """One forward and backward pass over the whole batch."""

    def __init__(self, model: TransformerXL, own: Engine, device: torch.device) -> None:
        """Take the place of `own`."""
        self.n_streams, self.devices = own.n_streams, [device]
        self._module = TrainingModel(model).to(device)
        self._width = model.config.d_model

    def split(self, memory: Memory) -> list[Memory]:
        """Return a memory that begins with no positions."""
        n_layer, device = len(self._module.layers), self.devices[0]
        return [Memory([torch.zeros(n_layer, 0, self.n_streams, self._width, device=device)], memory.length_B)]

    def run(
        self, batch: tuple[Tensor, Tensor, Tensor], memories: list[Memory], n_tokens: int, precision: Precision
    ) -> tuple[Tensor, list[Memory]]:
        """Add the gradients; see `Engine.run`."""
        inputs_TB, targets_TB, counted_TB = (tensor.t().contiguous().to(self.devices[0], non_blocking=True) for tensor in batch)
        self._module.train()
        with precision.autocast():
            nll_TB, kept = self._module(inputs_TB, targets_TB, memories[0].states[0])
        loss = (nll_TB.float() * counted_TB).sum() / n_tokens
        precision.backward(loss)
        return loss.detach(), [Memory([kept], memories[0].length_B)]

    def first_not_finite(self, batch: tuple[Tensor, Tensor, Tensor], memories: list[Memory], precision: Precision) -> str | None:
        """Return that the stand-in does not look: its modules are not the model's."""
        return "not looked for in this stand-in"


class ReferenceTrainer(Trainer):
    """Trains as the original does.

    Raises:
        ConfigError: it has no such training.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        train, optim = self.config.train, self.config.optim
        wanted = {
            "`batch_chunk` above 1": train.batch_chunk > 1,
            "several devices or processes": len(self.engine.devices) > 1 or self.world.size > 1,
            "`div_val` above 1 here": self.model.config.div_val > 1,
            "`dropatt`": self.model.config.dropatt > 0,
            f"`optim` {optim.optim}": optim.optim not in ("lamb", "jitlamb"),
            "`sample_softmax`": train.sample_softmax is not None,
            "`compile`": train.compile,
        }
        for what, is_wanted in wanted.items():
            if is_wanted:
                raise ConfigError(f"The stand-in for NVIDIA's training step has no {what}.", remedy="Leave it out.")
        self.engine = ReferenceEngine(self.model, self.engine, self.device)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = ReferenceLamb(parameters, lr=optim.lr, weight_decay=optim.weight_decay)
        self.memories = self._cold_memories()

    def step(self) -> StepReport:
        """Take one step, and read its loss."""
        report = super().step()
        float(report.loss)
        return report


if __name__ == "__main__":
    run.Trainer = ReferenceTrainer  # type: ignore[misc]
    sys.argv[0] = "txl"
    sys.exit(cli.main())
