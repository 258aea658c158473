"""`switchyard prepare`."""

import dataclasses
from typing import TYPE_CHECKING

from launch.commands import (
    Command,
    Options,
    allow_module,
    allowed_modules,
    option,
    store_of,
)
from launch.errors import EXIT_DONE, UsageError

if TYPE_CHECKING:
    from launch.config.reader import ResolvedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareOptions(Options):
    """What `prepare` accepts."""

    inspect: bool = option(
        "show what is in the store, which is made if it is missing: counts, lengths, "
        "and examples as text",
        False,
    )
    examples: int = option(
        "rows that --inspect shows of each Task; default: 3", 3, metavar="N"
    )
    num_workers: int = option(
        "processes of this machine that share the work; 0: one for each core",
        1,
        metavar="N",
    )
    runner: str | None = option(
        "Apache Beam runner that does the work, such as DirectRunner, FlinkRunner or "
        "DataflowRunner",
        metavar="NAME",
    )
    runner_option: tuple[str, ...] = option(
        "option of Beam; may be given several times", (), metavar="--OPTION=VALUE"
    )
    train_vocabulary: str | None = option(
        "only train a SentencePiece vocabulary, and write it there",
        metavar="FILE.model",
    )
    force: bool = option(
        "make the store (or the vocabulary) again, even if there is one, and from the "
        "start",
        False,
    )
    allow_module: bool = allow_module()


def run(config: "ResolvedConfig", options: PrepareOptions) -> int:
    """Prepares the token store of a configuration, or says what is in it."""
    _refuse(options)
    from launch.data import opening, preparing
    from launch.run import user_code
    from tasks.store import is_there, open_store

    allowed = allowed_modules(config, options)
    config = user_code.with_objective(config, allowed=options.allow_module)
    settings = config.settings
    store_dir = settings.data.store_dir
    if options.train_vocabulary:
        preparing.train_vocabulary(
            config,
            options.train_vocabulary,
            allowed_modules=allowed,
            force=options.force,
            quiet=options.quiet,
        )
        return EXIT_DONE
    if is_there(store_dir) and not options.force:
        if not options.inspect:
            print(f"{store_dir} is there already; --force prepares it again")
    else:
        preparing.prepare(
            config,
            engine=preparing.engine(
                options.num_workers, options.runner, options.runner_option
            ),
            allowed_modules=allowed,
            force=options.force,
            quiet=options.quiet,
        )
        print(f"prepared {store_dir}")
    if options.inspect:
        from launch.data.inspection import show

        show(opening.open_checked(config), settings, options.examples)
        return EXIT_DONE
    store = open_store(store_dir, settings.data, settings.filters)
    print(preparing.describe(store.manifest))
    return EXIT_DONE


def _refuse(options: PrepareOptions) -> None:
    """Options that mean nothing, or nothing together."""
    if options.num_workers < 0:
        raise UsageError(
            f"--num_workers={options.num_workers}: cannot be negative; 0 takes one for "
            "each core"
        )
    if options.runner and options.num_workers != 1:
        raise UsageError(
            "--runner decides how many workers there are: leave --num_workers out"
        )
    if options.runner_option and not options.runner:
        raise UsageError("--runner_option is for --runner, which is missing")


COMMAND = Command(
    group="Data",
    summary="make the token store that training reads",
    description="""\
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
""",
    options=PrepareOptions,
    devices=None,
    about=store_of,
    run=run,
)
