"""What the scripts here share: the flag --quick, and a clear word where a library is missing."""

import argparse
import importlib.util
import sys


def new_parser(text):
    """A parser that knows --quick and prints the text at the top of the script as --help."""
    parser = argparse.ArgumentParser(description=text,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true",
                        help="seconds in place of minutes, to see that the script works: "
                             "tiny sizes, drawn data, no other library; the numbers are no results")
    return parser


def parse(parser, words=None):
    """The command line; with --quick it is said at once that the numbers are no results."""
    args = parser.parse_args(words)
    if args.quick:
        print("--quick: tiny sizes, drawn data, no other library: the numbers are no results",
              flush=True)
    return args


def require(command, *modules):
    """End with the command that installs what is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{', '.join(missing)}: not installed; try: {command}", file=sys.stderr)
        sys.exit(2)
