"""The command line: `fmoe` and `python -m fmoe`."""


def main() -> None:
    """Run the command line; its modules (and torch) are imported here, not before."""
    from fmoe.cli.app import main as run

    run()
