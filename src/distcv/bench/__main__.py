"""Entry of ``python -m distcv.bench``."""

from distcv.bench import command

if __name__ == "__main__":
    command()
