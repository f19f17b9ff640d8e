"""A training's passes of networks and its augmentation through ``torch.compile``; everything else stays eager."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._dynamo.utils import counters
from torch._functorch import config as functorch
from torch.utils._pytree import tree_leaves, tree_map_only

from lqkd.data import ImageDataModule
from lqkd.errors import UsageError, first_line
from lqkd.quantization import quantizers
from lqkd.quantization.kernel import compiler_options, own_graphs

Compile = bool | str
"""Whether networks are compiled; ``cuda_graphs``: they are, and the device records their work."""
BACKEND = "inductor"
MOST_GRAPHS = 64
"""A network is compiled anew when something of it has changed, such as its bits: so often at most."""


class CompiledCall:
    """A network, or another function, that is called through ``torch.compile``: one graph of static shapes.

    The first call decides which shapes are compiled for. Batches of others, such as the last of an epoch, run eagerly,
    and so does a network that is not ``ready``.

    Attributes:
        passes: how often it was called.
        eager: how often it ran eagerly then, since the shapes were others or it was not ready.
        odd: the first other shapes and those that were compiled for; None while there were none.
        fresh: whether it was compiled since this was last set to false.
        seconds: that calls took in which it was compiled.

    Args:
        network: what is called, with tensors and whatever else is the same in each call.
        name: what a message calls it.
        ready: whether it can be compiled as it is now.
        cuda_graphs: whether the device records its work as CUDA graphs.
        whole: whether it must be one graph; otherwise what cannot be compiled runs eagerly in between.
        device: where it computes; None for where the parameters of a network are.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        name: str,
        ready: Callable[[], bool] = lambda: True,
        cuda_graphs: bool = False,
        whole: bool = True,
        device: str | None = None,
    ) -> None:
        self.name = name
        self.passes = self.eager = 0
        self.seconds = 0.0
        self.odd: tuple[str, str] | None = None
        self.fresh = False
        self._network, self._ready, self._cuda_graphs = network, ready, cuda_graphs
        self._shapes: list[tuple[torch.Size, torch.dtype]] | None = None
        if device is None:
            parameters = network.parameters() if isinstance(network, nn.Module) else iter(())
            device = next((parameter.device.type for parameter in parameters), "cpu")
        options = compiler_options(device) | {"fallback_random": True}  # dropout draws what it draws eagerly
        if cuda_graphs:
            options["triton.cudagraphs"] = True

        def call(*args: Any, **keywords: Any) -> Any:
            return network(*args, **keywords)

        arguments: dict[str, Any] = {"options": options} if BACKEND == "inductor" else {}
        self._compiled = own_graphs(call, MOST_GRAPHS, fullgraph=whole, dynamic=False, backend=BACKEND, **arguments)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """What the network returns.

        Raises:
            UsageError: when it cannot be compiled as one graph, or is compiled over and over.
        """
        self.passes += 1
        if not self._ready():
            self.eager += 1
            return self._network(*args, **keywords)
        tensors = [value for value in tree_leaves((args, keywords)) if isinstance(value, Tensor)]
        shapes = [(tensor.shape, tensor.dtype) for tensor in tensors]
        if self._shapes is None:
            self._shapes = shapes
        if shapes != self._shapes:
            self.eager += 1
            alike = [shape for shape, _ in shapes] == [shape for shape, _ in self._shapes]
            self.odd = self.odd or (_described(shapes, alike), _described(self._shapes, alike))
            return self._network(*args, **keywords)
        graphs, started = counters["stats"]["unique_graphs"], time.perf_counter()
        try:
            # Gradients may be asked for one loss after another, and callbacks may add hooks to a network.
            with functorch.patch(donated_buffer=False), dynamo.patch(skip_nnmodule_hook_guards=False):
                returned = self._compiled(*args, **keywords)
        except FailOnRecompileLimitHit as error:
            raise UsageError(
                f"compile is not possible: the {self.name} has changed {MOST_GRAPHS} times so that it must be compiled "
                "anew; set it to false (with TORCH_LOGS=recompiles PyTorch says what changes)"
            ) from error
        except TorchDynamoException as error:
            self._network(*args, **keywords)  # a mistake in the network itself is told as it is
            raise UsageError(
                f"compile is not possible: the {self.name} is no single graph ({first_line(error)}{_place(error)}); "
                "set it to false"
            ) from error
        if counters["stats"]["unique_graphs"] > graphs:
            self.fresh = True
            self.seconds += time.perf_counter() - started
        # The next run of a CUDA graph writes into the same memory.
        return tree_map_only(Tensor, torch.clone, returned) if self._cuda_graphs else returned


def _described(shapes: Sequence[tuple[torch.Size, torch.dtype]], with_dtype: bool) -> str:
    kinds = (f" {str(dtype).removeprefix('torch.')}" if with_dtype else "" for _, dtype in shapes)
    named = zip(shapes, kinds, strict=True)
    return ", ".join("x".join(map(str, shape)) + kind for (shape, _), kind in named if len(shape))


def _place(error: Exception) -> str:
    """Where in the network's code, as far as the compiler tells."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip().startswith('File "')]
    return f", {lines[-1]}" if lines else ""


class Compilation:
    """The compiled networks of one training, and its compiled augmentation.

    Attributes:
        setting: what the user wants.
        seconds: that steps took in which something was compiled, and augmentation that was.

    Args:
        setting: see the attribute.

    Raises:
        UsageError: when it is none.
    """

    def __init__(self, setting: Compile) -> None:
        if setting not in (True, False, "cuda_graphs"):
            raise UsageError(f"compile={setting!r} is not possible: it is true, false or cuda_graphs")
        self.setting = setting
        self.seconds = 0.0
        self._calls: dict[int, CompiledCall] = {}  # by the identity of the network
        self._data: ImageDataModule | None = None  # whose augmentation is compiled
        self._told = False

    def check(self, network: nn.Module, device: torch.device) -> None:
        """Refuse what cannot be compiled.

        Args:
            network: the one that is trained.
            device: where it is trained.

        Raises:
            UsageError: then.
        """
        if self.setting == "cuda_graphs" and device.type != "cuda":
            raise UsageError(
                f"compile='cuda_graphs' is not possible on a {device.type} device: use true, or trainer.accelerator=gpu"
            )
        moving = {type(q).__name__ for q in quantizers(network).values() if q.progress is not None}
        if self.setting and moving:
            raise UsageError(
                f"compile={self.setting!r} is not possible with quantizer {moving.pop()}, which changes in every step, "
                "so that each one would be compiled anew: use false, or another quantizer"
            )

    def start(self, name: str, network: nn.Module) -> None:
        """Compile a network, which messages call ``name``, in its next training pass."""
        own = [*quantizers(network).values()]

        def ready() -> bool:  # what fits itself to its first batch cannot be compiled
            return all(quantizer.is_ready for quantizer in own)

        graphs, whole = self.setting == "cuda_graphs", bool(self.setting)  # a teacher's own setting is not as strict
        self._calls[id(network)] = CompiledCall(network, name, ready, graphs, whole)

    def start_augmentation(self, data: Any, device: torch.device) -> None:
        """Compile what a data module of lqkd does to images on a GPU, from the next training batch on.

        Nothing happens where that is not wanted, nor to other data modules; what has to stay eager is told.

        Args:
            data: the data module of the training, or None.
            device: where it is trained.
        """
        if not self.setting or not isinstance(data, ImageDataModule):
            return
        reason = data.stays_eager()
        if device.type == "cpu":
            reason = "on a CPU it takes longer compiled"
        if reason is not None:
            rank_zero_info(f"compile: the augmentation runs eagerly: {reason}")
            return
        self._data = data
        data.compiled = self._calls[id(data)] = CompiledCall(data.augment, "augmentation", device=device.type)

    def stop(self) -> None:
        """Run everything eagerly again."""
        self._calls = {}
        if self._data is not None:
            self._data.compiled = None
        self._data = None

    def begin(self) -> None:
        """A training begins: nothing is compiled yet, whatever became of the one before."""
        self.stop()
        self.seconds, self._told = 0.0, False

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_calls": {}, "_data": None}  # what is compiled cannot be pickled, and is compiled anew

    def begin_step(self) -> None:
        """Say that nobody needs what compiled networks returned in the step before."""
        if self.setting == "cuda_graphs":
            torch.compiler.cudagraph_mark_step_begin()

    def of(self, network: nn.Module) -> Callable[..., Any]:
        """What to call in a training pass in the place of ``network``."""
        return self._calls.get(id(network), network)

    def __contains__(self, network: nn.Module) -> bool:
        return id(network) in self._calls

    def end_step(self, seconds: float) -> None:
        """Tell what was compiled in a step that took so long, and that of the first batch of another shape."""
        fresh = [call for call in self._calls.values() if call.fresh]
        before = [call for call in fresh if call is self._calls.get(id(self._data))]  # the step begins
        in_step = [call for call in fresh if call not in before]
        for call in before:
            self.seconds += call.seconds
            rank_zero_info(f"compile: {call.name}, in {call.seconds:.1f} s")
            call.seconds = 0.0
        if in_step:
            self.seconds += seconds
            names = " and ".join(call.name for call in in_step)
            rank_zero_info(f"compile: {names}, in a step that took {seconds:.1f} s")
        for call in fresh:
            call.fresh = False
        odd = next((call for call in self._calls.values() if call.odd), None)
        if odd is not None and odd.odd is not None and not self._told:
            self._told = True
            rank_zero_info(
                f"compile: a batch of {odd.odd[0]} runs eagerly, as every one that is not of {odd.odd[1]} does"
            )

    def verdict(self) -> str | None:
        """What there is to say at the end where less than half of the passes were compiled; None otherwise."""
        for call in self._calls.values():
            if call is self._calls.get(id(self._data)) and not call.passes:
                return f"compile: the augmentation ran eagerly: {type(self._data).__name__} has a preprocess of its own"
            if 2 * call.eager > call.passes:
                return (
                    f"compile: {call.eager} of {call.passes} batches of the {call.name} ran eagerly: their shapes are "
                    "not those of the first, or a quantizer was not fitted yet"
                )
        return None
