"What all tests share."
import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    "Networks this small lose more to waiting for a second thread than it gives, most of all on a busy machine."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
