"""The operators, one a file: shapes, reference, other forms, cost."""

from vitcmp.kernels.ops.differential import differential_attention
from vitcmp.kernels.ops.entmax import entmax_attention
from vitcmp.kernels.ops.layers import add_linear, norm_linear, norm_mlp
from vitcmp.kernels.ops.neighbours import neighbour_attention
from vitcmp.kernels.ops.pseudo_inverse import pseudo_inverse
from vitcmp.kernels.ops.rows import layer_norm, linear_gelu
from vitcmp.kernels.ops.sigmoid import sigmoid_attention
from vitcmp.kernels.ops.softmax import softmax_attention
from vitcmp.kernels.ops.summed import efficient_attention, linear_attention

__all__ = [
    "add_linear", "differential_attention", "efficient_attention", "entmax_attention", "layer_norm",
    "linear_attention", "linear_gelu", "neighbour_attention", "norm_linear", "norm_mlp", "pseudo_inverse",
    "sigmoid_attention", "softmax_attention",
]  # fmt: skip
