"""Entry of ``python -m distcv.export``."""

from distcv.export import command

if __name__ == "__main__":
    command()
