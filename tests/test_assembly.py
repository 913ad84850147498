"""The rival of the one pass is what it says: torchvision's transforms, in a loader."""
import pytest
import torch

from rest_nb.assembly import OneByOne, assembly_seconds
from rest_nb.batches import CIFAR, FACES, PLAIN, Transform, assemble


def images(n, height=3, width=4):
    return torch.randint(256, (n, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("transform, pictures", [(Transform(1, True, CIFAR.mean, CIFAR.std), 18), (FACES, 2), (PLAIN, 1)])
def test_both_ways_make_the_same_pictures(transform, pictures):
    x = images(1)
    if transform is PLAIN: transform = Transform(mean=(0.,) * 3, std=(1.,) * 3)
    torch.manual_seed(0)
    data = OneByOne(x, transform)
    one_by_one = {tuple(data[0].flatten().tolist()) for _ in range(400)}
    at_once = assemble(x, [0] * 400, transform, generator=torch.Generator().manual_seed(0))
    assert one_by_one == {tuple(image.flatten().tolist()) for image in at_once} and len(one_by_one) == pictures


def test_each_contestant_has_a_time():
    seconds = assembly_seconds(images(8), CIFAR, batch=4, workers=(0, 1), rounds=1)
    assert list(seconds) == ["channels_last", "batch_last", "torchvision, 0 workers", "torchvision, 1 workers"]
    assert all(0 < value < 10 for value in seconds.values())
