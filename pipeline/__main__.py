"""`python -m pipeline` is `fpt`: torchrun starts modules."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
