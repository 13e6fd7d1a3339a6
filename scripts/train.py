"""Trains a model: `python scripts/train.py CONFIG.yaml [--field value ...] [--resume]`.

Started on several hosts, or as several processes of one, with the addresses that
`jax.distributed.initialize` reads from the environment, the processes train one model together.
"""

from yoso_jax import cli
from yoso_jax.train_command import main

if __name__ == "__main__":
    cli.run(lambda: main("train.py"))
