"""Fine-tunes a model: `python scripts/finetune.py CONFIG.yaml --init-from CHECKPOINT ...`.

As scripts/train.py, for configurations of the kind `finetune`: see configs/finetune.
"""

from yoso_jax import cli
from yoso_jax.train_command import main

if __name__ == "__main__":
    cli.run(lambda: main("finetune.py", kinds=("finetune",)))
