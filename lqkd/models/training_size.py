"""What the distillation of a Llama takes in memory and operations, on paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

_FLOAT = 4
_LOGITS = 11.3
"""Tensors as large as logits at the peak, with cross-entropy and one divergence of predictions, as measured: those of
teacher and student, their rows, log-probabilities and gradients."""


@dataclass(frozen=True)
class LlamaSize:
    """The sizes of a decoder of Llama's kind: RMS norm, rotary positions, a gated perceptron, no biases.

    Args:
        vocabulary: tokens.
        width: channels of hidden states.
        depth: blocks.
        feed_forward: channels within the perceptron.
        heads: of the attention.
        key_value_heads: of keys and values; null for as many as ``heads``.
        tied: whether the head is the embedding.

    Examples:
        >>> seven = LlamaSize(vocabulary=32000, width=4096, depth=32, feed_forward=11008, heads=32, tied=False)
        >>> f"{seven.parameters:,}"
        '6,738,415,616'
    """

    vocabulary: int
    width: int
    depth: int
    feed_forward: int
    heads: int
    key_value_heads: int | None = None
    tied: bool = True

    @property
    def keys(self) -> int:
        """Channels of keys, and of values."""
        return self.width // self.heads * (self.key_value_heads or self.heads)

    @property
    def block_weights(self) -> int:
        """Weights of the linear layers of a block."""
        return self.width * (2 * self.width + 2 * self.keys + 3 * self.feed_forward)

    @property
    def head_weights(self) -> int:
        """Weights of the layer that gives the logits."""
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        """All of them, an embedding that is the head once."""
        norms = (2 * self.depth + 1) * self.width
        return self.depth * self.block_weights + norms + self.head_weights * (1 if self.tied else 2)


class TrainingSize(NamedTuple):
    """Bytes that a process of a training holds, and operations of a step; see :func:`training_size`.

    Args:
        latents: the student's weights, in float32.
        gradients: of them.
        optimizer: its state.
        teacher: its weights.
        rounded: the student's weights on their grids, which the backward pass needs: of all layers, or of one block.
        activations: what the backward pass needs of them.
        logits: of both networks, and all of their size.
        total: at the largest moment, at which not all of these are there where activations are computed again.
        operations: floating-point operations of a step, two for a product and its sum.

    Examples:
        >>> TrainingSize(4, 4, 8, 2, 4, 6, 12, 40, 1e12).total
        40
    """

    latents: int
    gradients: int
    optimizer: int
    teacher: int
    rounded: int
    activations: int
    logits: int
    total: int
    operations: float


def training_size(
    student: LlamaSize,
    teacher: LlamaSize | None,
    *,
    texts: int,
    context: int,
    optimizer_bytes: float = 8.0,
    teacher_bytes: float = 2.0,
    gradient_checkpointing: bool = False,
    quantized_inputs: bool = False,
    grids_of_blocks: bool = False,
) -> TrainingSize:
    """What a process holds in a training in float32, but for the quantizers' steps and buffers of libraries.

    Attention is taken to be one that keeps no (T, T) matrix. Of a token a block keeps ``6 w + 2 a + 2 k + 4 f`` numbers
    (w: width, a: queries, k: keys, f: feed-forward), and with quantised inputs ``5 w + a + f`` more; logits take 11.3
    times their size, which is what was measured. Held against PyTorch's own count in a test.

    Args:
        student: its sizes.
        teacher: the teacher's; None for one that answers from a cache.
        texts: of a batch of one process.
        context: tokens of a text.
        optimizer_bytes: of an optimizer's state, per parameter: 8 for AdamW, 2 for one with moments of 8 bits.
        teacher_bytes: per parameter of the teacher: 4 for fp32, 2 for bf16.
        gradient_checkpointing: whether blocks compute their activations again.
        quantized_inputs: whether inputs of layers are quantised beside weights.
        grids_of_blocks: whether the grids are of blocks (``q4_0``), which keep weights twice.

    Examples:
        >>> one = LlamaSize(vocabulary=49152, width=576, depth=30, feed_forward=1536, heads=9, key_value_heads=3)
        >>> size = training_size(one, one, texts=2, context=256)
        >>> round(size.latents / 2**20), round(size.activations / 2**20), round(size.logits / 2**20)
        (513, 658, 1085)
    """
    tokens, parameters = texts * context, student.parameters
    width, keys, wide = student.width, student.keys, student.feed_forward
    block = 6 * width + 2 * width + 2 * keys + 4 * wide + student.heads + 2
    block += 6 * width + wide if quantized_inputs else 0
    ends = 4 * width  # of the embedding and the last norm
    copies = 2 if grids_of_blocks else 1
    of_head, logits = copies * student.head_weights, tokens * _LOGITS * student.vocabulary
    if gradient_checkpointing:
        kept = tokens * (student.depth * width + ends)
        of_block = tokens * (block + 2 * wide)  # gradients of its perceptron among them
        rounded = copies * student.block_weights
        activations, largest = kept + of_block, max(kept + logits + of_head, kept + of_block + rounded)
    else:
        activations = tokens * (student.depth * block + ends)
        rounded = copies * student.depth * student.block_weights + of_head
        largest = activations + rounded + logits
    held = parameters * (2 * _FLOAT + optimizer_bytes)
    of_teacher = 0 if teacher is None else teacher.parameters * teacher_bytes
    passes = 8 if gradient_checkpointing else 6  # a forward pass is 2 operations a weight and token, a backward pass 4
    operations = float(passes) * _multiplied(student, context) * tokens
    operations += 0.0 if teacher is None else 2.0 * _multiplied(teacher, context) * tokens
    return TrainingSize(
        latents=_FLOAT * parameters,
        gradients=_FLOAT * parameters,
        optimizer=round(optimizer_bytes * parameters),
        teacher=round(of_teacher),
        rounded=_FLOAT * rounded,
        activations=_FLOAT * activations,
        logits=round(_FLOAT * logits),
        total=round(held + of_teacher + _FLOAT * largest),
        operations=operations,
    )


def _multiplied(size: LlamaSize, context: int) -> int:
    """Products of a token in a forward pass: weights, and its share of attention to those before it."""
    return size.depth * (size.block_weights + size.width * context) + size.head_weights
