"""The optimizer: Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), and its learning rate.

A convolution's step is its gradient's moving average made orthogonal, so that all directions learn at the same pace;
its size is that of AdamW's (Liu et al. 2025, arXiv 2502.16982), by which the other weights are trained.
"""

import math

import keras
import numpy as np
from keras import KerasTensor, ops

ROUNDS_PER_PART = (
    3,
    2,
)  # Newton's and Schulz's five rounds; all in one would diverge in TF32, a GPU's float32


class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """A line from 0 to `peak` over `warmup` steps, then a cosine down to 0 over `decay` steps.

    Without a branch: Keras's CosineDecay has one, which TensorFlow would trace anew for every weight.
    """

    def __init__(self, peak: float, warmup: int, decay: int) -> None:
        self.peak, self.warmup, self.decay = peak, warmup, decay

    def __call__(self, step: KerasTensor) -> KerasTensor:
        """Give the learning rate of a step, counted from 0."""
        step = ops.cast(step, "float32")
        fallen = ops.clip((step - self.warmup) / self.decay, 0.0, 1.0)
        share = 0.5 * (1 + ops.cos(np.pi * fallen))
        return self.peak * (ops.minimum(step / self.warmup, share) if self.warmup else share)


class Muon(keras.optimizers.Muon):
    """Keras's Muon, which knows matrices only, for convolutions: a kernel (h, w, in, out) is a matrix (h·w·in, out).

    An up-convolution's (h, w, out, in) is (h·w·out, in). The last layer, normalizations, biases and depthwise
    convolutions are trained by AdamW.
    """

    def __init__(self, learning_rate: float | WarmupCosine, weight_decay: float) -> None:
        # The size of a step is set below, so Keras need not.
        super().__init__(
            learning_rate, weight_decay=weight_decay, adam_weight_decay=weight_decay, rms_rate=None
        )

    def _should_use_adamw(self, variable: keras.Variable) -> bool:
        return (
            len(variable.shape) != 4 or variable.shape[-1] == 1 or "probabilities" in variable.path
        )

    def zeropower_via_newtonschulz5(self, x: KerasTensor, steps: int) -> KerasTensor:
        """Make a kernel's matrix orthogonal and as large as a step of AdamW: Keras's polynomials, in fewer operations.

        A round is X → (a + bG + cG²)X with G = XXᵀ, and G's next value follows from G alone. So the long matrix is
        multiplied at the start and end of each PART only, where G is computed anew, since its errors grow. Equal to
        Keras's in float32; in a GPU's TF32 the step of a matrix with very unlike directions is less exact, but bounded.
        """
        rows, columns = math.prod(x.shape[:-1]), x.shape[-1]
        matrix = ops.reshape(x, (rows, columns))
        matrix = matrix / (ops.norm(matrix) + 1e-7)
        eye = np.eye(min(rows, columns), dtype="float32")
        for rounds in ROUNDS_PER_PART:
            flipped = ops.transpose(matrix)
            gram = ops.matmul(flipped, matrix) if rows > columns else ops.matmul(matrix, flipped)
            product = None
            for i in range(rounds):
                factor = (
                    self.muon_a * eye + self.muon_b * gram + self.muon_c * ops.matmul(gram, gram)
                )
                product = factor if product is None else ops.matmul(factor, product)
                if i + 1 < rounds:
                    gram = ops.matmul(ops.matmul(factor, gram), factor)
            matrix = ops.matmul(matrix, product) if rows > columns else ops.matmul(product, matrix)
        return 0.2 * math.sqrt(max(rows, columns)) * ops.reshape(matrix, x.shape)


def make_optimizer(
    learning_rate: float, weight_decay: float, steps: int, warmup: float
) -> keras.Optimizer:
    """Make the optimizer of a training of so many steps, of which a share `warmup` warms up to the learning rate."""
    first = int(warmup * steps)
    return Muon(WarmupCosine(learning_rate, first, max(1, steps - first)), weight_decay)
