"""The optimizer: Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) with a schedule.

A convolution's step is the moving average of its gradient, made orthogonal, so that all directions
learn at the same pace. Its size is that of an AdamW step (Liu et al. 2025, arXiv 2502.16982), and
AdamW trains the other weights.
"""

import math

import keras
import numpy as np
from keras import KerasTensor, ops

WARMUP = 0.1  # share of the steps
WEIGHT_DECAY = 1e-4
# The five rounds of Newton and Schulz, in parts; all in one would diverge in a GPU's TF32.
ROUNDS_PER_PART = 3, 2


class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """A line from 0 to `peak` over `warmup` steps, then a cosine down to 0 over `decay` steps.

    Keras's CosineDecay has a branch that TensorFlow would trace again for every weight.
    """

    def __init__(self, peak: float, warmup: int, decay: int) -> None:
        self.peak, self.warmup, self.decay = peak, warmup, decay

    def __call__(self, step: KerasTensor) -> KerasTensor:
        """Return the learning rate of a step, counted from 0."""
        step = ops.cast(step, "float32")
        progress = ops.clip((step - self.warmup) / self.decay, 0.0, 1.0)
        factor = 0.5 * (1 + ops.cos(np.pi * progress))
        if self.warmup:
            factor = ops.minimum(step / self.warmup, factor)
        return self.peak * factor


class Muon(keras.optimizers.Muon):
    """Keras's Muon, which knows matrices only, for convolutions.

    A kernel ([d,] h, w, in, out) is a matrix (d·h·w·in, out), that of an up-convolution
    ([d,] h, w, out, in) is (d·h·w·out, in). AdamW trains the last layer, normalizations, biases
    and depthwise convolutions.
    """

    def __init__(self, learning_rate: float | WarmupCosine, weight_decay: float) -> None:
        # rms_rate None: the size of a step is set below.
        super().__init__(
            learning_rate, weight_decay=weight_decay, adam_weight_decay=weight_decay, rms_rate=None
        )

    def _should_use_adamw(self, variable: keras.Variable) -> bool:
        is_kernel = len(variable.shape) in (4, 5) and variable.shape[-1] > 1
        return not is_kernel or "probabilities" in variable.path

    def _all_reduce_sum_gradients(self, grads_and_vars: list) -> list:
        """Leave the gradients of a single process as they are; TensorFlow alone calls this.

        Its sum of one addend would register a gradient that keeps the whole graph of the training
        in memory: 35 MB for each run of a process.
        """
        import tensorflow as tf

        if tf.distribute.get_strategy().num_replicas_in_sync == 1:
            return grads_and_vars
        return super()._all_reduce_sum_gradients(grads_and_vars)

    def zeropower_via_newtonschulz5(self, x: KerasTensor, steps: int) -> KerasTensor:
        """Make a kernel's matrix orthogonal and as large as a step of AdamW.

        Keras's polynomials in fewer operations. A round is X → (a + bG + cG²)X with G = XXᵀ, and
        the next G follows from G alone. So the long matrix is multiplied only at the start and
        the end of each part, where G is computed anew because its errors grow. Equal to Keras's
        result in float32. In TF32 the step of an ill-conditioned matrix is less exact, but
        bounded.
        """
        rows, columns = math.prod(x.shape[:-1]), x.shape[-1]
        is_tall = rows > columns
        matrix = ops.reshape(x, (rows, columns))
        matrix = matrix / (ops.norm(matrix) + 1e-7)
        identity = np.eye(min(rows, columns), dtype="float32")
        for rounds in ROUNDS_PER_PART:
            flipped = ops.transpose(matrix)
            gram = ops.matmul(flipped, matrix) if is_tall else ops.matmul(matrix, flipped)
            product = None
            for i in range(rounds):
                factor = self.muon_a * identity + self.muon_b * gram
                factor += self.muon_c * ops.matmul(gram, gram)
                product = factor if product is None else ops.matmul(factor, product)
                if i + 1 < rounds:
                    gram = ops.matmul(ops.matmul(factor, gram), factor)
            matrix = ops.matmul(matrix, product) if is_tall else ops.matmul(product, matrix)
        return 0.2 * math.sqrt(max(rows, columns)) * ops.reshape(matrix, x.shape)


def make_optimizer(learning_rate: float, steps: int) -> keras.Optimizer:
    """Make the optimizer of a training of so many steps; `learning_rate` is the peak."""
    warmup = int(WARMUP * steps)
    return Muon(WarmupCosine(learning_rate, warmup, max(1, steps - warmup)), WEIGHT_DECAY)
