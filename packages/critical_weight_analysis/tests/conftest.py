import pytest
from tiny_models import BUILDERS, build, random_sequences


@pytest.fixture
def tiny_model():
    """The function ``build(name, dtype)``, for tests that choose their model."""
    return build


@pytest.fixture(params=sorted(BUILDERS))
def model(request):
    """Each tiny model in float64, in eval mode, no parameter requiring a gradient."""
    return build(request.param)


@pytest.fixture
def sequences():
    """Eight random sequences of 2 to 12 tokens, two of the same length, so that they predict 1 to 11 tokens."""
    return random_sequences()
