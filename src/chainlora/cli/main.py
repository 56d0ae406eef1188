"""The command line: parse, call, print. Results go to stdout, progress and logs to stderr.

Exit status: 0 success; 1 an error of chainlora, in one line; 2 wrong usage; 3 a stage forgot more
than ``--max-forgetting`` allows; 128 plus the signal number after a signal. A traceback is shown
only with ``--debug``. torch is imported when a command runs, so that ``--help`` is fast.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback

import click

from chainlora import __version__
from chainlora.cli import (
    data_files,
    doctor,
    generate,
    run_files,
    scores,
    train,
    updating,
    versioning,
    views,
)
from chainlora.cli.common import REMOVED, SIGNALLED, Verbs, is_first_process, prepared_streams
from chainlora.errors import (
    ChainLoRAError,
    ConfigError,
    DivergedError,
    ForgettingError,
    PeerFailedError,
    StoppedError,
    is_out_of_memory,
    one_line,
    sentence,
)
from chainlora.files import file_error

FORGOT = 3  # the exit status of `--max-forgetting`
_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}
_FIRST_STEPS = """\b
First steps:
  chainlora demo               train a small model on three months of a shop's FAQ
  chainlora train CONFIG       train your own; `chainlora schema --markdown` lists the keys
  chainlora COMMAND --help     the arguments of a command
"""


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit status."""
    if "_CHAINLORA_COMPLETE" in os.environ:  # click writes bytes for shell completion
        return _run(arguments)
    with prepared_streams():
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        status = cli.main(arguments, prog_name="chainlora", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.UsageError as error:
        message = one_line(error.format_message())
        if isinstance(error, click.NoSuchOption) and error.option_name in REMOVED:
            message = f"No such option {error.option_name}; use {REMOVED[error.option_name]}"
        click.UsageError(message, error.ctx).show()
        return 2
    except click.ClickException as error:
        return _fail(error.format_message(), debug)
    except StoppedError as error:
        if is_first_process():
            click.echo(f"chainlora: {error}", err=True)
        return SIGNALLED + error.signal
    except PeerFailedError:
        return 1
    except ForgettingError as error:
        _fail(str(error), debug)
        return FORGOT
    except DivergedError as error:
        return _fail(str(error), debug) if is_first_process() else 1
    except (KeyboardInterrupt, click.exceptions.Abort):  # click converts KeyboardInterrupt
        click.echo("chainlora: interrupted", err=True)
        return SIGNALLED + signal.SIGINT
    except BrokenPipeError:  # the reader of the output is gone: chainlora log RUN | head -1
        return 1
    except ChainLoRAError as error:
        return _fail(str(error), debug)
    except Exception as error:
        return _fail(_foreign_error(error), debug)


def _foreign_error(error: Exception) -> str:
    """Return the message for an exception that chainlora does not raise itself."""
    if is_out_of_memory(error):
        return sentence(
            "the work must fit into memory",
            "out of memory",
            "lower train.batch_size or data.max_length, set train.gradient_checkpointing: true or "
            "train.dtype: bfloat16, or take a smaller model",
        )
    if isinstance(error, OSError):
        return str(file_error(error, error.filename or "a file", "read and written"))
    name = type(error).__name__
    return f"unexpected {name}: {str(error)[:400]} (run with --debug for the traceback)"


def _fail(message: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    click.echo(f"chainlora: error: {one_line(message)}", err=True)
    return 1


@click.group(cls=Verbs, context_settings=_SETTINGS, epilog=_FIRST_STEPS)
@click.version_option(__version__, prog_name="chainlora")
@click.option("--debug", is_flag=True, help="Show tracebacks and debug logs. Allowed anywhere.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Chain of LoRA fine-tuning (arXiv 2401.04151): tune a LoRA, tie a knot, extend the chain."""
    level = logging.WARNING if is_first_process() else logging.ERROR
    logging.basicConfig(stream=sys.stderr, level=level, format="chainlora: %(message)s")
    verb, count = context.invoked_subcommand, os.environ.get("WORLD_SIZE", "1")
    if verb not in (None, "train", "extend") and count != "1":
        raise ConfigError(
            "only `chainlora train` and `extend` run in several processes (got "
            f"chainlora {verb} in {count}); start it without torchrun or accelerate launch"
        )


_MODULES = (train, versioning, updating, run_files, data_files, scores, generate, views, doctor)

for _module in _MODULES:
    for _verb in vars(_module).values():
        if isinstance(_verb, click.Command):
            cli.add_command(_verb)
