import pytest

from tests.core.kernels.ground import Ground, find_ground


@pytest.fixture
def ground() -> Ground:
    return find_ground()
