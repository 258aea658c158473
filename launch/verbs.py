"""The verbs of the command line: what each says of itself, accepts and runs.

Read before anything else is imported: standard library only.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from launch.errors import UsageError

ABOUT = """\
Switchyard trains sparse mixture-of-experts transformers in JAX.

A run is described by gin files: one chooses the hardware, one the model, one the data
and the length of training. A run lives in one folder, its MODEL_DIR.
"""

EXAMPLES = """\
examples:
  switchyard train --gin_file=configs/runs/demo.gin
  switchyard evaluate --model_dir=runs/demo
  switchyard generate --model_dir=runs/demo --prompt='def main('

`switchyard VERB --help` explains a verb. configs/base.gin lists every knob.
"""

_TRAIN = """\
Trains a model. Prepares the tokens first, if they are not there yet.

Gin files give values to knobs: upper-case macros such as NUM_EXPERTS. configs/base.gin
lists them all, with default, unit and paper. Files are read in their order, then the
knobs of the command line; what is later wins:

  switchyard train --gin_file=configs/runs/demo.gin --gin.TRAIN_STEPS=50
  switchyard train --gin_file=configs/runs/demo.gin \\
      --gin_file=configs/models/demo_glam.gin --gin.MODEL_DIR=runs/demo_glam
  switchyard train --gin_file=mine.gin --gin.LEARNING_RATE=3e-4 --gin.DTYPE=float32

Text needs no quotes there; a tuple or dict needs those of the shell:
--gin.TASK_FEATURE_LENGTHS="{'targets': 512}". A gin file is sought in the working
directory, then beside the file that includes it, then among those of Switchyard.
"""

_TRAIN_RESULT = """\
MODEL_DIR holds, while the run goes on: config.gin (every knob, its value, and the line
that set it), checkpoints, metrics, and a report.

Resuming: the same command again continues from the newest checkpoint in MODEL_DIR, as
if it had never stopped. It may run on another mesh. Take another MODEL_DIR to start
afresh.

exit codes:
  0   done
  1   an error of usage, configuration or data: do not restart
  17  too many steps in a row were not finite: do not restart
  42  preempted, and saved: restart the same command
  130 interrupted at the keyboard
  134 another process of the job was lost: restart the same command for all
"""

_EVALUATE = """\
Scores the held-out split, each token once, with a checkpoint of a run.

  switchyard evaluate --model_dir=runs/demo
  switchyard evaluate --model_dir=runs/demo --step=200 --gin.EVAL_CAPACITY_FACTOR=2.0

The run's own config.gin is read first; files and knobs given here override it.
"""

_GENERATE = """\
Continues a text with a checkpoint of a run.

  switchyard generate --model_dir=runs/demo --prompt='def main(' --num_tokens=64
  switchyard generate --model_dir=runs/demo --prompt='import ' --temperature=0
  switchyard generate --model_dir=runs/demo_span --prompt='def <extra_id_0>(self):'

A model that has learnt to fill in masked spans is asked with <extra_id_0>, <extra_id_1>
and so on in their places; what it says of each stands there in the answer.
The run's own config.gin is read first; files, knobs and options given here override it.
What is not given is taken from its SAMPLE_ knobs. Only the text goes to standard
output.
"""

_PREPARE = """\
Makes the token store that training reads: runs the SeqIO Tasks once.

  switchyard prepare --gin_file=configs/runs/demo.gin
  switchyard prepare --gin_file=configs/runs/demo.gin --inspect
  switchyard prepare --gin_file=mine.gin --allow_module --num_workers=8
  switchyard prepare --gin_file=mine.gin --runner=FlinkRunner \\
      --runner_option=--flink_master=localhost:8081
  switchyard prepare --gin_file=mine.gin --train_vocabulary=mine.model

`train` does this by itself when the store is missing. This verb does it on a machine
without accelerators, or ahead of time. If it is stopped, even killed, the same command
goes on where it was; what is done lies in STORE_DIR.preparing until the store is
whole. The store is the same however many workers made it. docs/data.md says how to
bring text of your own.
"""

_REVIEW = """\
Ranks the labelled examples of a Task by how likely their label is wrong, for review.

  switchyard review --gin_file=mine.gin --allow_module --output=review.jsonl

A classifier of hashed words is cross-validated, and confident learning finds labels
that disagree with it (arXiv:1911.00068). docs/quality.md says what the numbers mean.
"""

_VERIFY = """\
Proves that a configuration is the same model on a mesh as on one device.

  switchyard verify --gin_file=configs/runs/demo.gin
  switchyard verify --gin_file=configs/runs/m6_t_1t.gin --mesh=data=60,expert=8 \\
      --mesh=expert=480
  switchyard verify --gin_file=mine.gin --json=verified.json

Sizes shrink, choices stay; at most 16 CPU devices are simulated, whatever PLATFORM
says. Loss, gradient of every parameter, parameters after a step, choices of the
routers, and more, are compared in float32. No data are needed. docs/verify.md says
what is compared, and why each tolerance is what it is.
"""

_VERIFY_RESULT = """\
exit codes:
  0   the same
  1   something differs, or cannot be verified
"""

_PLAN = """\
Answers, without the hardware: does a run fit, how fast could it be, what would it cost?

  switchyard plan --gin_file=configs/runs/demo.gin --topology=v5e:2x2 --search
  switchyard plan --gin_file=configs/runs/glam_64b_64e.gin --topology=v4:8x8x16 \\
      --mesh=data=16,expert=64 --gin.FSDP=data_expert --gin.REMAT=full --compile
  switchyard plan --gin_file=configs/runs/m6_t_1t.gin --topology=v100-32g:480 \\
      --search --output=mine.gin --html=plan.html

A topology is v4:8x8x16, 2*v5e:16x16 (two slices) or h100:64. Without --compile all is
arithmetic; with it the TPU's own compiler answers for memory, collectives and products
(`make tpu-compiler`; no TPU is needed). docs/plan.md says how to read the tables.
"""

_PLAN_RESULT = """\
exit codes:
  0   it fits
  1   it does not fit, or cannot be planned
"""

Flags = Callable[["Parser"], None]


class Verb(NamedTuple):
    """What a verb is called, says of itself, accepts and runs."""

    summary: str
    description: str
    epilog: str
    flags: Flags
    module: str
    uses_jax: bool = True
    simulates: bool = False  # its module says on which devices, before jax starts


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UsageErrors."""

    def error(self, message: str) -> NoReturn:
        """Raises what the user did wrong, instead of ending the process."""
        raise UsageError(f"{message}; see {self.prog} --help")


def _train_flags(parser: Parser) -> None:
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="say what the run would do, and stop before it does anything",
    )
    parser.add_argument(
        "--self_check",
        choices=["on", "off"],
        help="compare the sparse layer with the oracle on these devices, and the "
        "CPU's compiler with NumPy, before training; sets SELF_CHECK",
    )
    _allow_module_flag(parser)


def _prepare_flags(parser: Parser) -> None:
    parser.add_argument(
        "--inspect",
        action="store_true",
        help="show what is in the store: counts, lengths, and examples as text",
    )
    parser.add_argument(
        "--examples",
        type=int,
        default=3,
        metavar="N",
        help="rows that --inspect shows of each Task; default: 3",
    )
    parser.add_argument(
        "--num_workers",
        type=int,
        default=1,
        metavar="N",
        help="processes of this machine that share the work; 0: one for each core",
    )
    parser.add_argument(
        "--runner",
        metavar="NAME",
        help="Apache Beam runner that does the work, such as DirectRunner, "
        "FlinkRunner or DataflowRunner",
    )
    parser.add_argument(
        "--runner_option",
        action="append",
        default=[],
        metavar="--OPTION=VALUE",
        help="option of Beam; may be given several times",
    )
    parser.add_argument(
        "--train_vocabulary",
        metavar="FILE.model",
        help="only train a SentencePiece vocabulary, and write it there",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="make the store (or the vocabulary) again, even if there is one, and from "
        "the start",
    )
    _allow_module_flag(parser)


def _review_flags(parser: Parser) -> None:
    parser.add_argument(
        "--output", required=True, metavar="FILE.jsonl", help="where the ranking goes"
    )
    parser.add_argument("--split", help="split to look at; default: TRAIN_SPLIT")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="examples to write; default: all"
    )
    _allow_module_flag(parser)


def _verify_flags(parser: Parser) -> None:
    parser.add_argument(
        "--mesh",
        action="append",
        default=[],
        metavar="AXIS=N,AXIS=N",
        help="mesh in place of the configuration's; axes that are not named have size "
        "1; may be given several times",
    )
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of weights and tokens"
    )


def _plan_flags(parser: Parser) -> None:
    parser.add_argument(
        "--topology", required=True, metavar="CHIP:SHAPE", help="such as v4:8x8x16"
    )
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,AXIS=N",
        help="mesh in place of the configuration's; axes not named have size 1",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="look for the mesh and the knobs that fit and are fast",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="ask the TPU's compiler; of a search, about the best few",
    )
    parser.add_argument(
        "--compile_best",
        type=int,
        default=3,
        metavar="N",
        help="meshes of a search that are compiled; default: 3",
    )
    parser.add_argument(
        "--output", metavar="FILE.gin", help="write what --search finds there"
    )
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    parser.add_argument("--html", metavar="FILE", help="write a page there")
    numbers = {
        "pue": (1.1, "R", "power of the building over that of the chips; default: 1.1"),
        "tonnes_per_mwh": (None, "T", "of CO2 equivalents; without it none is said"),
        "price": (None, "P", "of an hour of a chip; without it no cost is said"),
        "time_limit": (600, "S", "seconds after which compiling ends; default: 600"),
        "memory_limit": (12, "GIB", "of this machine, for compiling; default: 12"),
    }
    for name, (default, metavar, meaning) in numbers.items():
        parser.add_argument(
            f"--{name}", type=float, default=default, metavar=metavar, help=meaning
        )


def _allow_module_flag(parser: Parser) -> None:
    parser.add_argument(
        "--allow_module",
        action="store_true",
        help="import MIXTURE_OR_TASK_MODULE, and so run its code, even if it is not "
        "one of Switchyard's own tasks",
    )


def _checkpoint_flags(parser: Parser) -> None:
    parser.add_argument(
        "--model_dir", required=True, metavar="DIR", help="folder of the run"
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="checkpoint to take; default: the newest"
    )


def _evaluate_flags(parser: Parser) -> None:
    _checkpoint_flags(parser)
    parser.add_argument(
        "--metrics",
        choices=["on", "off"],
        help="run the Tasks' own metric functions on what is predicted for held-out "
        "inputs; default: where there are inputs and the Tasks' code may be run",
    )
    _allow_module_flag(parser)


# Options of `generate`, and the knobs that they set.
SAMPLE_KNOBS = {
    "prompt": ("SAMPLE_PROMPT", "text to continue"),
    "num_tokens": ("SAMPLE_TOKENS", "tokens to draw at most"),
    "temperature": ("SAMPLE_TEMPERATURE", "of the softmax; 0 takes the likeliest"),
    "top_k": ("SAMPLE_TOP_K", "draw from the k likeliest tokens; 0: from all"),
    "top_p": ("SAMPLE_TOP_P", "draw from the smallest set of this probability"),
    "seed": ("SAMPLE_SEED", "of the draws"),
    "num_beams": ("NUM_BEAMS", "hypotheses of beam search, instead of draws; 1: draw"),
}


def _generate_flags(parser: Parser) -> None:
    _checkpoint_flags(parser)
    for option, (macro, meaning) in SAMPLE_KNOBS.items():
        parser.add_argument(f"--{option}", metavar="X", help=f"{meaning}; sets {macro}")


VERBS = {
    "train": Verb(
        "train a model, or resume its training",
        _TRAIN,
        _TRAIN_RESULT,
        _train_flags,
        "launch.train",
    ),
    "evaluate": Verb(
        "score held-out data with a trained model",
        _EVALUATE,
        "",
        _evaluate_flags,
        "launch.evaluation.heldout",
    ),
    "generate": Verb(
        "continue a text with a trained model",
        _GENERATE,
        "",
        _generate_flags,
        "launch.evaluation.sampling",
    ),
    "verify": Verb(
        "prove that a mesh computes what one device computes",
        _VERIFY,
        _VERIFY_RESULT,
        _verify_flags,
        "launch.verify",
        simulates=True,
    ),
    "plan": Verb(
        "say whether a run fits, how fast it could be, and what it costs",
        _PLAN,
        _PLAN_RESULT,
        _plan_flags,
        "launch.plan",
        uses_jax=False,
    ),
    "prepare": Verb(
        "make the token store that training reads",
        _PREPARE,
        "",
        _prepare_flags,
        "launch.prepare",
        uses_jax=False,
    ),
    "review": Verb(
        "rank labelled examples by how likely their label is wrong",
        _REVIEW,
        "",
        _review_flags,
        "launch.review",
        uses_jax=False,
    ),
}
