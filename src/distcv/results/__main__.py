"""Entry of ``python -m distcv.results``."""

from distcv.results import command

if __name__ == "__main__":
    command()
