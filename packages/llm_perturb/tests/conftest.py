import pytest
import torch
from tiny_models import BUILDERS, build, random_sequences

torch.set_num_threads(1)  # the last bit of a sum depends on how many share it, and tables are compared byte for byte


@pytest.fixture(params=sorted(BUILDERS))
def model(request):
    """Each tiny model in float64, in eval mode, no parameter requiring a gradient."""
    return build(request.param)


@pytest.fixture
def sequences():
    """Eight random sequences of 2 to 12 tokens, two of the same length."""
    return random_sequences()
