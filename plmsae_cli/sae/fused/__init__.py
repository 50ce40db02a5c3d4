"""The training step of the TopK family, JumpReLU and Switch on CUDA: encoder by GEMM, the rest over active pairs (Triton).

`step.FusedStep` is what training calls, or its like in `jump`, `switch` and `latents`; each other file holds one
part: kernels first, then the function that launches them. Tensors that belong together reach kernels in one NamedTuple,
as pointers. All of it computes what the model's `loss`, autograd, `project_gradients`, clipping, Adam and
`normalize_decoder` compute, in bfloat16 with float32 sums and masters: that path is the plain twin. Sums have a
fixed order and there are no float atomics, so steps repeat bit for bit.

Letters as in `sae.interface`, and: T rows of a tile, G nested groups (1 for TopK), S splits of a sum.
"""
