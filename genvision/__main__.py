"""`python -m genvision` is the `genvision` command."""

from genvision.cli import main

if __name__ == "__main__":
    main()
