"Loads the kernels, by one thread: processes that are forked from one that has imported this find them loaded."
import torch

from rest_nb.configs import Config
from rest_nb.data import BiasedDataset
from rest_nb.experiments import run_seed
from rest_nb.inference import freeze
from rest_nb.models import cnn

torch.set_num_threads(1)
noise = BiasedDataset(torch.randint(0, 256, (40, 3, 28, 28)).byte(), torch.arange(40) % 10, torch.arange(40) // 4)
run_seed(Config(sparsity="masks.RigL", reweighting="reweighting.sample", width=8, batch_size=16, steps=4, eval_every=2), 0, lambda split: noise)
freeze(cnn(width=8))(torch.rand(1, 3, 28, 28))
