"""Text in, deterministic batches of tokens out.

Importing this package, `store`, `batches` or `objectives` never imports TensorFlow or
SeqIO: training from a prepared store runs without them.
"""
