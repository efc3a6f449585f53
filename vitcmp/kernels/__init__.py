"""Operators with fast forms: the ground floor, which knows tensors and nothing of mechanisms or models.

Each operator is declared once, in `ops/`: the shapes that it takes, a reference in torch, faster forms, their cost. All
calls go through one door, `Operator`: it checks shapes as torch would, takes the form that is quickest on this kind of
CPU, and takes the reference wherever the fast form can't run. `VITCMP_KERNELS=auto|off|strict` is the user's switch.

The words used here, one for one idea:

- **operator**: a function of tensors with several forms (`softmax_attention`, `norm_mlp`).
- **form**: one way to compute an operator (`merged`, `fused`, `numba`). **reference**: the form in torch alone that
  takes all that torch takes. **kernel**: the form `numba`, a compiled loop over memory.
- **lane**: one number of a vector register; a vector has 16. **tile**: rows and columns of a product that are summed
  in registers. **panel**: columns of a right operand that lie side by side. **part**: the range of heads or rows that
  a thread takes at once; of many keys or queries, those that meet at a time. **block**: tokens or rows that pass
  through a kernel together.
- **packed**: copied to the order in which products read it; **along**: tokens stay rows; **across**: transposed.
- **zero padding**: zeros (or -inf, for scores) in place of tokens that do not exist.
- **profile**: measurements by which a form is chosen; **kind of CPU**: its maker and instructions.
- **wide**: in fp32 at least.
"""

from vitcmp.kernels.operator import COMPILED, Operator, forget_used, operators, used
from vitcmp.kernels.shapes import ShapeError
from vitcmp.kernels.switch import KernelError, KernelWarning, mode, no_numba, out_of_memory, switched

__all__ = [
    "COMPILED", "KernelError", "KernelWarning", "Operator", "ShapeError", "forget_used", "mode", "no_numba",
    "operators", "out_of_memory", "switched", "used",
]  # fmt: skip
