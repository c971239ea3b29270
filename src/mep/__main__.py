"""`python -m mep` is the command `mep`."""

from mep.cli import app

if __name__ == "__main__":
    app(prog_name="mep")
