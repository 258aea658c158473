"""Rules of parts of a model; `moe/constraints.py` asks them all."""
