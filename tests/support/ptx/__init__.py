"""A PTX interpreter: runs what Triton and nvcc compile for a GPU, at the addresses of CPU tensors.

`parser` reads PTX, `compiler` makes a Python function of each instruction, `machine` runs a launch
of them on memory that is named allocation by allocation (`memory`). What a thread computes is in
`operations` and `arithmetic`: numpy arrays with an element for each thread of some blocks. `driver`
is the stand-in driver that runs Triton's own launches here.

An instruction, a modifier or a directive that is not known is an error. So is an access out of
bounds, one that is not aligned, a write to read-only memory, a read of shared memory that was not
written, a division by zero and a race.

PTX leaves undefined what a register is before it is written. A compiler computes with it in threads
whose results nothing uses, so undefined bits may be moved and computed with. They are an error
where they are compared, decide a branch, a guard or a choice, address memory or are stored.
"""
