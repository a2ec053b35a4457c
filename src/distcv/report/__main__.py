"""Entry of ``python -m distcv.report``."""

from distcv.report import command

if __name__ == "__main__":
    command()
