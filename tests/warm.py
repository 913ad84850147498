"Loads the kernels, by one thread: processes that are forked from one that has imported this find them loaded."
import torch

from rest_nb.__main__ import compile

torch.set_num_threads(1)
compile(None)
