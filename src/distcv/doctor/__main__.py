"""``python -m distcv.doctor``."""

from distcv.doctor import command

if __name__ == "__main__":
    command()
