"""Run `fpt` as `python -m fpt`; torchrun starts modules."""

from fpt.cli import main

if __name__ == "__main__":
    main()
