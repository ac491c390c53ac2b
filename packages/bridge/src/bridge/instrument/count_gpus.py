"""Print how many GPUs torch can use: ``python -m bridge.instrument.count_gpus``, with a Python that has torch."""

import torch

if __name__ == "__main__":
    print(torch.cuda.device_count() if torch.cuda.is_available() else 0)
