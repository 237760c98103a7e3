"""A PTX interpreter: runs what Triton and nvcc compile for a GPU, at the addresses of CPU tensors.

`parser` reads PTX, `compiler` makes a Python function of each instruction, `machine` runs a launch
of them on memory that is named allocation by allocation (`memory`). What a thread computes is in
`operations` and `arithmetic`: numpy arrays with an element for each thread of some blocks. `driver`
is the stand-in driver that runs Triton's own launches here.

An instruction, a modifier or a directive that is not known is an error. So is an access out of
bounds, one that is not aligned, a write to read-only memory, a read of a register or of shared
memory that was not written, a division by zero and a race. No fused multiply-add and nothing
approximate or flushed to zero was met in what triton 3.9 and nvcc 13 emit.
"""
