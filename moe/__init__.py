"""Sparse mixture-of-experts transformers: the model and its learning algorithm.

Everything below this folder is a pure function or a container of arrays; nothing
here reads a file. Shapes are part of names, with one meaning in the whole repository:

    B sequences    L length           G groups          S tokens per group
    E experts      C slots per expert per group         K choices per token
    J choices a token may hold in an Assignment (K for token choice)
    R rows of one expert               M model width     F feed-forward width
    P periods of layers, one sparse layer each
    N attention heads                  U heads of keys and values
    D head width                       V vocabulary

A capital is the global, logical size. Inside `shard_map` a lower-case letter is the
local share of that dimension: `x_gSM` holds this device's groups. Scalars and trees
carry no suffix.
"""
