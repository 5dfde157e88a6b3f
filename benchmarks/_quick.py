"""Shared by the scripts here: the flag --quick, checks of the command line, child processes."""

import argparse
import importlib.util
import os
import subprocess
import sys


def new_parser(text):
    """A parser that knows --quick and prints the text at the top of the script as --help."""
    parser = argparse.ArgumentParser(description=text,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true",
                        help="check in seconds that the script works: tiny sizes, drawn data, "
                             "no other library; the numbers are no results")
    return parser


def parse(parser, words=None):
    """The parsed command line; prints with --quick that the numbers are no results."""
    args = parser.parse_args(words)
    if args.quick:
        print("--quick: tiny sizes, drawn data, no other library: the numbers are no results",
              flush=True)
    return args


def require_runs_or_quick(parser, args):
    """End with an error unless exactly one of `runs` and --quick is given."""
    if bool(args.runs) == args.quick:
        parser.error("give either folders of finished runs, or --quick")


def require(command, *modules):
    """End with the command that installs the missing modules."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{', '.join(missing)}: not installed; try: {command}", file=sys.stderr)
        sys.exit(2)


def run_python(*words, **environment):
    """Standard output of a new Python process; if it fails, end with everything it printed."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True,
                          env=os.environ | environment)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stdout
