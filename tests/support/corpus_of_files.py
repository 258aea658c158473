"""SeqIO Tasks over files that a test writes into the folder CORPUS of its environment.

Lines of two languages in several files, pairs, and a Mixture. Imports TensorFlow.
"""

import os

import seqio

from tasks.factories import add_json_lines, add_text_lines

FOLDER = os.environ["CORPUS"]

add_text_lines(
    "lines",
    {"train": f"{FOLDER}/train-*.txt", "validation": f"{FOLDER}/validation.txt"},
)
add_json_lines(
    "tongues",
    {"train": f"{FOLDER}/train-*.jsonl", "validation": f"{FOLDER}/validation.jsonl"},
    text="text",
    language_field="language",
)
add_json_lines(
    "pairs",
    {"train": f"{FOLDER}/train-*.jsonl", "validation": f"{FOLDER}/validation.jsonl"},
    inputs="question",
    targets="text",
)
seqio.MixtureRegistry.add("both", [("lines", 3), ("tongues", 1)])
