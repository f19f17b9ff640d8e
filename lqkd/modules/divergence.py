"""Noticing a loss that is NaN or infinite in the step in which it is, on all processes, without waiting for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, distributed, nn

from lqkd.errors import DivergenceError
from lqkd.quantization.modes import evaluating
from lqkd.tasks import Inputs


class LossWatch:
    """Whether a loss is finite on every process, asked for after the forward pass and answered after the backward pass.

    On an accelerator the answer travels to the host while the backward pass runs, and between processes likewise, so
    that nobody waits.
    """

    def __init__(self) -> None:
        self._finite: Tensor | None = None
        self._work: distributed.Work | None = None
        self._host: Tensor | None = None
        self._event: torch.cuda.Event | None = None
        self._stream: torch.cuda.Stream | None = None

    def ask(self, loss: Tensor) -> None:
        """Begin to find out; ``loss`` is 0-dim. All processes must call this together."""
        self._finite = loss.detach().isfinite().to(torch.int32)
        several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        self._work = distributed.all_reduce(self._finite, distributed.ReduceOp.MIN, async_op=True) if several else None
        if loss.device.type == "cuda":
            self._fetch(loss.device)

    def _fetch(self, device: torch.device) -> None:
        """Copy the answer to the host on a stream of its own: the backward pass does not queue behind it."""
        assert self._finite is not None
        if self._stream is None or self._event is None or self._host is None:
            self._stream, self._event = torch.cuda.Stream(device), torch.cuda.Event()
            self._host = torch.empty((), dtype=torch.int32, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            if self._work is not None:
                self._work.wait()
            self._host.copy_(self._finite, non_blocking=True)
            self._event.record(self._stream)
        self._finite.record_stream(self._stream)

    def finite(self) -> bool:
        """The answer to the last question; True when there is none."""
        if self._finite is None:
            return True
        if self._finite.device.type == "cuda":
            assert self._event is not None
            assert self._host is not None
            self._event.synchronize()
            answer = self._host
        else:
            if self._work is not None:
                self._work.wait()
            answer = self._finite
        self._finite = None
        return bool(answer)


def diverged(module: LightningModule, losses: Mapping[str, Tensor], network: nn.Module, inputs: Inputs) -> None:
    """Say what a loss that is not finite comes from.

    Args:
        module: attached to a Trainer, after a backward pass and before the step.
        losses: the total first, then its parts, 0-dim each.
        network: what was trained.
        inputs: what it was called with for the batch.

    Raises:
        DivergenceError: always.
    """
    trainer = module.trainer
    (total, loss), *parts = ((name, float(value.detach())) for name, value in losses.items())
    sentence = f"training diverged at step {trainer.global_step} (epoch {trainer.current_epoch}): {total} is {loss}"
    if all(value.isfinite() for value in losses.values()):
        sentence = sentence.replace(f"{total} is {loss}", f"{total} is not finite on another process")
    if parts:
        sentence += f" ({', '.join(f'{name} {value:.4g}' for name, value in parts)})"
    found = [text for text in (_broken_tensor(network), _broken_output(network, inputs)) if text]
    good = next((path for c in trainer.checkpoint_callbacks if (path := getattr(c, "last_model_path", ""))), None)
    raise DivergenceError(
        "; ".join([sentence, *found, f"last good checkpoint: {good or 'none yet'}"])
        + ". A lower learning rate, model.gradient_clip_val or more bits may help"
    )


def _broken_tensor(network: nn.Module) -> str:
    named = [*network.named_parameters(), *network.named_buffers()]
    broken = [name for name, tensor in named if tensor.is_floating_point() and not tensor.isfinite().all()]
    if not broken:
        return "all weights, steps of quantizers and statistics are finite"
    scales = [name for name in broken if "quantizer" in name] or broken
    return f"not finite is {scales[0]}" + (f" and {len(broken) - 1} more" if len(broken) > 1 else "")


@torch.no_grad()
def _broken_output(network: nn.Module, inputs: Inputs) -> str:
    """The first layer, in the order of the forward pass, that gives values that are not finite for this batch."""
    if not all(bool(tensor.isfinite().all()) for tensor in inputs.tensors()):
        return "the images are not finite" if inputs.alone() is not None else "the inputs are not finite"
    found: list[str] = []

    def look(name: str) -> object:
        def hook(layer: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return hook

    leaves = [(name, layer) for name, layer in network.named_modules() if not list(layer.children())]
    parents = [(name, layer) for name, layer in network.named_modules() if name and list(layer.children())]
    handles = [layer.register_forward_hook(look(name)) for name, layer in leaves + parents]  # type: ignore[arg-type]
    try:
        with evaluating(network):
            inputs.call(network)
    finally:
        for handle in handles:
            handle.remove()
    return f"the first layer with such an output is {found[0]}" if found else "no output of a layer is (in evaluation)"
