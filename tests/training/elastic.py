"""A run under torchrun whose second process dies once. `torchrun -m tests.training.elastic DIR`"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from tests.training.toys import OPTIM, RUN, Regression, ToyConfig
from training import loop
from training.config import ParallelConfig
from training.loop import Session
from training.parallel import connect


class Dying(Regression):
    def backward(self, name, step, micro, scale):
        if step == 4 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os._exit(1)
        return super().backward(name, step, micro, scale)


def main() -> None:
    torch.set_num_threads(1)
    processes = connect(ParallelConfig(), torch.device("cpu"))
    config = ToyConfig(run=replace(RUN, micro_batches=2), optim=OPTIM)
    loop.run(Dying(), config, {"g": OPTIM}, Path(sys.argv[1]), Session(processes=processes))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
