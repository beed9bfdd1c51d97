"""The entry point: commands are imported only when they run, errors become one line."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from importlib import import_module
from io import StringIO

import click

from simexplain import __version__
from simexplain.errors import SimexplainError, meant

from .console import echo, echo_lines

COMMANDS = {
    "explain": "Heatmaps of what makes images alike or different to a model.",
    "attribute": "Take a distance apart: which nodes of which level make it up.",
    "match": "Show which region of one picture corresponds to which of another.",
    "search": "Find the pictures nearest to one, and why each was found.",
    "index": "Embed a folder of pictures, to be searched and explained.",
    "batch": "Explain thousands of comparisons from a CSV file, resumable.",
    "segment": "Find in a picture what others show, and cut it out.",
    "compare": "Methods side by side on the same images, with their scores.",
    "evaluate": "Retrieval of a model, faithfulness of methods, over a data set.",
    "train": "Train a network on a data set, with attention and retrieval.",
    "fit": "Fit AVSL to a trained network, which attribute needs.",
    "bank": "Grad-weights of a labelled folder, for the method weight_bank.",
    "layers": "List the layers of a model that can carry a heatmap.",
    "demo": "Explain a bundled triplet, without a network connection.",
}
"""Every command and its line in the overview; the module of the same name holds the command."""


class _Lazy(click.Group):
    """A group whose overview needs no command to be imported: that would import torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"{__package__}.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with a suggestion for a command that is misspelt."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            hint = meant(args[0], COMMANDS) or f"; expected one of {', '.join(COMMANDS)}."
            ctx.fail(f"No such command '{args[0]}'{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


_HELP = """\b
Why does this model say these images are alike?
MODEL: timm:NAME, hf:ORG/NAME, a folder or a file. More: simexplain COMMAND -h"""


@click.group(
    cls=_Lazy,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help=_HELP,
)
@click.version_option(__version__, prog_name="simexplain")
def cli() -> None:
    """Why does this model say these images are alike?"""


def main() -> None:
    """Runs the command line; exit code 1 for errors in what was given, 2 for usage."""
    # Read by MKL when it first computes: without it, runs on processors with AVX-512 differ in
    # their last bits, and a batch that was resumed would differ from one that was not.
    os.environ.setdefault("MKL_CBWR", "AUTO")
    if not sys.warnoptions:  # what libraries advise programmers is not for users of a command
        warnings.filterwarnings("ignore", module=r"(torch|torchvision|timm|transformers)(\.|$)")
    # Importing torch makes half a million objects, through all of which the collector would go
    # again and again: a fifth of the time until a command begins.
    often, *rarely = gc.get_threshold()
    gc.set_threshold(max(often, 100_000), *rarely)
    try:
        code = cli.main(standalone_mode=False)
    except click.UsageError as error:
        usage = StringIO()
        error.show(file=usage)
        echo_lines(usage.getvalue().rstrip(), err=True)
        code = error.exit_code
    except click.ClickException as error:
        code = _complain(error.format_message(), 1)
    except SimexplainError as error:
        code = _complain(str(error), 1)
    except (KeyboardInterrupt, click.Abort):
        code = _complain("Interrupted; nothing was written.", 130)
    except BrokenPipeError:
        # The reader of a pipe went away; silence the flush at exit as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except MemoryError:
        code = _complain("Not enough memory; use smaller images or a smaller --upscale.", 1)
    except Exception as error:
        if os.environ.get("SIMEXPLAIN_DEBUG"):
            raise
        text = " ".join(str(error).split())[:300]
        code = _complain(
            f"Unexpected {type(error).__name__}: {text}; SIMEXPLAIN_DEBUG=1 shows where, please "
            "report it.",
            1,
        )
    gc.set_threshold(often, *rarely)
    sys.exit(code)


def _complain(text: str, code: int) -> int:
    echo(f"Error: {text}", err=True)
    return code


if __name__ == "__main__":
    main()
